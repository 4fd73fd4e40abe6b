"""The shell of a guest, here a plain shell in the guest's place, and the RAM disk that a guest starts from."""

import lzma
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from virtio.cli import guest as guests
from virtio.cli.guest import FIRST, LONGEST, SHELL, Guest
from virtio.cli.initrd import Archive, Kernel, find_kernel, libraries, make_initrd, module_name, modules_of
from virtio.cli.output import CommandError


@pytest.fixture
def guest() -> Iterator[Guest]:
    with Guest(["sh", "-c", SHELL]) as made:
        made.wait_ready()
        yield made


def test_commands_have_their_lines_and_their_status(guest: Guest) -> None:
    seen: list[str] = []
    assert guest.run("echo one; echo two >&2; false", show=seen.append) == (1, ["one", "two"])
    assert seen == ["one", "two"]
    assert guest.run("printf half") == (0, ["half"])
    assert guest.run("cat") == (0, [])  # there is nothing to read
    assert guest.run("x='a  *'; echo \"$x\"")[1] == ["a  *"]
    assert guest.read("echo ' 7 '") == "7"
    with pytest.raises(CommandError, match="'false' failed"):
        guest.read("false")


def test_a_first_line_is_given_when_it_is_asked_for() -> None:
    with Guest(["sh", "-c", FIRST.strip('"')], first=f"word='of mine'; {SHELL}") as made:
        made.wait_ready()
        assert made.read('echo "$word"') == "of mine"


def test_what_is_no_line_is_refused(guest: Guest) -> None:
    for command in ("one\ntwo", "x" * (LONGEST + 1)):
        with pytest.raises(ValueError, match="one line"):
            guest.run(command)
    assert guest.read("echo still") == "still"


def test_a_guest_that_ends_is_told_with_its_last_word(guest: Guest) -> None:
    with pytest.raises(CommandError, match=r"^sh ended with status 3: Kernel panic$"):
        guest.run("echo Kernel panic; exit 3")
    with pytest.raises(CommandError, match=r"^sh ended with status 3: Kernel panic$"):
        guest.run("echo again")


def test_a_guest_that_is_killed_is_told_though_its_helpers_live(guest: Guest) -> None:
    with pytest.raises(CommandError, match=r"^sh was ended by SIGKILL"):
        guest.run("sleep 1000 & kill -9 $$")


def test_a_guest_that_hangs_is_told_in_time(guest: Guest) -> None:
    with pytest.raises(CommandError, match=r"^sh did not finish 'sleep' in time$"):
        guest.run("sleep 1000", limit=0.2)


def test_a_guest_that_says_nothing_is_told_in_time() -> None:
    with Guest(["sleep", "1000"]) as silent, pytest.raises(CommandError, match=r"^sleep did not start in time$"):
        silent.wait_ready(limit=0.2)


def test_there_may_be_no_sense_in_going_on(guest: Guest) -> None:
    def check() -> None:
        raise CommandError("the other end is gone")

    with Guest(["sleep", "1000"], check=check) as silent, pytest.raises(CommandError, match="other end"):
        silent.wait_ready()


@pytest.mark.parametrize(("program", "package"), guests.PACKAGES.items())
def test_a_program_that_is_missing_is_told_with_its_package(program: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    with pytest.raises(CommandError, match=f"^{program} not found: install the Debian package {package}$"):
        guests.require([program])


@pytest.mark.parametrize(("flags", "needed"), [("fpu sse2 avx512f", False), ("fpu amx_tile avx512f", True)])
def test_a_library_for_amx_is_made_where_it_is_needed(flags: str, needed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t:\n")
    monkeypatch.setattr(guests, "CPUINFO", tmp_path / "cpuinfo")
    found = guests.xstate(tmp_path)
    assert set(found) == ({"LD_PRELOAD"} if needed else set())
    if needed:
        assert Path(found["LD_PRELOAD"]).read_bytes().startswith(b"\x7fELF")
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(CommandError, match="AMX needs a C compiler: install the Debian packages gcc and libc6-dev"):
            guests.xstate(tmp_path)


@pytest.fixture
def kernel(tmp_path: Path) -> Callable[[dict[str, str]], Kernel]:
    def make(modules: dict[str, str]) -> Kernel:
        for release in ("6.1.0-9-cloud-amd64", "6.1.0-10-cloud-amd64"):
            (tmp_path / f"lib/modules/{release}/kernel/net").mkdir(parents=True)
            (tmp_path / "boot").mkdir(exist_ok=True)
            (tmp_path / f"boot/vmlinuz-{release}").touch()
        folder = tmp_path / "lib/modules/6.1.0-10-cloud-amd64"
        for name, needs in modules.items():
            content = b"\x7fELF\0license=GPL\0depends=" + needs.encode() + b"\0retpoline=Y\0"
            path = folder / "kernel/net" / name
            path.write_bytes(lzma.compress(content) if path.suffix == ".xz" else content)
        (folder / "modules.builtin").write_text("kernel/drivers/virtio/virtio.ko\nkernel/lib/some-thing.ko\n")
        return find_kernel(tmp_path)

    return make


def test_modules_come_after_what_they_need(kernel: Callable[[dict[str, str]], Kernel]) -> None:
    found = kernel({"virtio_net.ko": "net_failover,virtio,some_thing", "net-failover.ko.xz": "failover", "failover.ko": "", "other.ko": ""})
    assert found.release == "6.1.0-10-cloud-amd64"  # the newest, by number
    assert [module_name(path) for path in modules_of(found, ["virtio_net", "failover"])] == ["failover", "net_failover", "virtio_net"]


def test_a_module_that_is_missing_or_packed_in_a_strange_way_is_told(kernel: Callable[[dict[str, str]], Kernel]) -> None:
    found = kernel({"virtio_net.ko": "nowhere", "far.ko.zst": ""})
    with pytest.raises(CommandError, match=r"has no module nowhere: install the Debian package linux-image-cloud-amd64$"):
        modules_of(found, ["virtio_net"])
    with pytest.raises(CommandError, match=r"compressed as \.zst"):
        modules_of(found, ["far"])


def test_no_kernel_is_told_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CommandError, match=r"no kernel in .*linux-image-cloud-amd64"):
        find_kernel(tmp_path)
    monkeypatch.setattr("virtio.cli.initrd.places", lambda: [tmp_path])
    with pytest.raises(CommandError, match=r"make guest-tools in .* unpacks one, or install the Debian package linux-image-cloud-amd64"):
        find_kernel()
    monkeypatch.setattr("virtio.cli.initrd.CLONE", tmp_path)  # installed by pip
    with pytest.raises(CommandError, match=r"^no kernel for the guest: install the Debian package linux-image-cloud-amd64"):
        find_kernel()


def unpacked(data: bytes) -> dict[str, tuple[int, bytes]]:
    """Mode and content by name."""
    found: dict[str, tuple[int, bytes]] = {}
    place = 0
    while True:
        assert data[place : place + 6] == b"070701"
        numbers = [int(data[place + 6 + 8 * index : place + 14 + 8 * index], 16) for index in range(13)]
        _, mode, *_, size = numbers[:7]
        length = numbers[11]
        name = data[place + 110 : place + 110 + length - 1].decode()
        place += 110 + length + 3 & ~3
        if name == "TRAILER!!!":
            return found
        assert name not in found
        found[name] = mode, data[place : place + size]
        place += size + 3 & ~3


def test_the_archive_has_what_was_put_into_it(kernel: Callable[[dict[str, str]], Kernel]) -> None:
    archive = Archive()
    archive.file("a/b/c", b"12345", mode=0o755)
    archive.file("a/d", b"")
    archive.folder("a/b")
    assert unpacked(archive.pack()) == {"a": (0o40755, b""), "a/b": (0o40755, b""), "a/b/c": (0o100755, b"12345"), "a/d": (0o100644, b"")}


def test_the_ram_disk_has_programs_with_their_libraries(kernel: Callable[[dict[str, str]], Kernel]) -> None:
    found = kernel({"virtio_net.ko": "failover", "failover.ko": ""})
    files = unpacked(make_initrd(found, "echo begins", modules=["virtio_net"], programs=["ls"]))
    assert files["bin/ls"][1].startswith(b"\x7fELF")
    assert libraries(Path("/bin/ls")) and all(str(path).lstrip("/") in files for path in libraries(Path("/bin/ls")))
    start = files["init"][1].decode()
    assert start.index("insmod /modules/failover.ko") < start.index("insmod /modules/virtio_net.ko") < start.index("echo begins")
    with pytest.raises(CommandError, match="no-such-program not found"):
        make_initrd(found, "", modules=[], programs=["no-such-program"])

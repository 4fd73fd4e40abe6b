"""The command line itself: help, completion, wrong words, pipes, terminals, signals."""

import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.cli.run import LIMIT, command, environment, failed, run, started
from virtio.cli.app import cli

ESCAPE = "\x1b"
SUBCOMMANDS = ("probe", "demo", "serve", "completion")


def on_terminal(*words: str, **more: str) -> tuple[int, str]:
    """Runs the command on a terminal of its own; exit code, and what the terminal got."""
    ours, theirs = pty.openpty()
    with started(command(*words), stdin=theirs, stdout=theirs, stderr=theirs, env=environment(**more)) as process:
        os.close(theirs)
        text = b""
        while True:
            try:
                data = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            text += data
        os.close(ours)
        return process.wait(LIMIT), text.decode()


def test_version_help_and_no_words_at_all() -> None:
    from virtio import __version__

    assert run("--version").stdout == f"virtio {__version__}\n"
    assert run().returncode == 0 and run().stdout == run("--help").stdout == run("-h").stdout
    for subcommand in SUBCOMMANDS:
        done = run(subcommand, "--help")
        assert done.returncode == 0 and done.stdout.startswith(f"Usage: virtio {subcommand}") and not done.stderr
        assert subcommand in run().stdout


def test_the_installed_script_is_the_command() -> None:
    script = Path(sys.executable).with_name("virtio")
    assert subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout == run("--version").stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["--nonsense"], "--nonsense"),
        (["probe"], "TARGET"),
        (["probe", "emulated:net", "emulated:rng"], "unexpected extra argument"),
        (["probe", "emulated:net", "--jsn"], "--jsn"),
        (["probe", ""], "emulated:net, emulated:rng, qemu:DEVICE"),
        (["probe", "emulated"], "emulated:net, emulated:rng, qemu:DEVICE"),
        (["probe", "emulated:"], "emulated:net, emulated:rng, qemu:DEVICE"),
        (["probe", "emulated:blk"], "'emulated:blk'"),
        (["probe", "qemu:"], "'qemu:'"),
        (["probe", "pci:0000:00:04.0"], "qemu:DEVICE"),
        (["probe", "foo:\n\x1b[31mbar"], "foo:"),
        (["demo", "extra"], "unexpected extra argument"),
        (["demo", "--seconds"], "--seconds"),
        (["demo", "--seconds", "0"], "1<=x<=3600"),
        (["demo", "--seconds", "-1"], "1<=x<=3600"),
        (["demo", "--seconds", "3601"], "1<=x<=3600"),
        (["demo", "--seconds", "1.5"], "'1.5'"),
        (["demo", "--seconds", "nan"], "'nan'"),
        (["demo", "--packed=yes"], "--packed"),
        (["demo", "--qemu=yes"], "--qemu"),
        (["demo", "--no-offloads=1"], "--no-offloads"),
        (["demo", "--json=1"], "--json"),
        (["completion"], "bash, zsh, fish"),
        (["completion", "tcsh"], "'tcsh'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(words: list[str], said: str) -> None:
    line = failed(run(*words), 2)
    assert said in line and ESCAPE not in line


def test_a_missing_program_is_named_with_its_debian_package(tmp_path: Path) -> None:
    assert failed(run("demo", PATH=str(tmp_path)), 1) == "virtio: ping not found: install the Debian package iputils-ping"
    (tmp_path / "ping").symlink_to("/bin/true")
    assert failed(run("demo", PATH=str(tmp_path)), 1) == "virtio: iperf3 not found: install the Debian package iperf3"
    (tmp_path / "iperf3").symlink_to("/bin/true")
    expected = "virtio: qemu-system-x86_64 not found: install the Debian package qemu-system-x86"
    assert failed(run("demo", "--qemu", PATH=str(tmp_path)), 1) == expected
    assert "qemu-system-x86" in failed(run("probe", "qemu:virtio-rng-pci", PATH=str(tmp_path)), 1)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_that_names_the_command(shell: str) -> None:
    done = run("completion", shell)
    assert done.returncode == 0 and not done.stderr
    assert f"_VIRTIO_COMPLETE={shell}_complete" in done.stdout and "virtio" in done.stdout
    if program := shutil.which(shell):
        assert subprocess.run([program, "-n"], input=done.stdout, text=True, capture_output=True).stderr == ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("virtio ", {"probe", "demo", "serve", "completion"}),
        ("virtio serve ", {"net", "rng"}),
        ("virtio de", {"demo"}),
        ("virtio serve dice", {"dice"}),  # a file, as the shell knows them
        ("virtio probe emu", {"emulated:net", "emulated:rng"}),
        ("virtio probe vh", {"vhost-user:"}),
        ("virtio probe vhost-user:/run/x", {"vhost-user:/run/x"}),
        ("virtio demo --", {"--qemu", "--guest", "--kernel", "--packed", "--no-offloads", "--seconds", "--json", "--help"}),
        ("virtio completion ", {"bash", "zsh", "fish"}),
    ],
)
def test_words_are_completed(words: str, expected: set[str]) -> None:
    done = run(_VIRTIO_COMPLETE="bash_complete", _VIRTIO_LINE=words, _VIRTIO_WORDBREAKS=" \t\n")
    assert {line.partition(",")[2] for line in done.stdout.split()} == expected and not done.stderr


@pytest.mark.parametrize(
    ("line", "breaks", "expected"),
    [
        ("probe em", " :=", {"emulated:net", "emulated:rng"}),
        ("probe emulated:", " :=", {"net", "rng"}),
        ("probe emulated:n", " :=", {"net"}),
        ("probe emulated:n", " ", {"emulated:net"}),
        ("probe qemu:vir", " :=", {"virtio-net-pci"}),
        ("probe emulated:net --js", " :=", {"--json"}),
    ],
)
def test_bash_completes_behind_a_colon(line: str, breaks: str, expected: set[str], tmp_path: Path) -> None:
    program = tmp_path / "virtio"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(command())} "$@"\n')
    program.chmod(0o755)
    script = f"""{run("completion", "bash").stdout}
        COMP_WORDBREAKS='{breaks}' COMP_LINE='virtio {line}' COMP_POINT={len("virtio " + line)}
        _virtio_completion '{program}'
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, timeout=LIMIT, env=environment())
    assert set(done.stdout.split()) == expected and not done.stderr


def test_colour_is_for_terminals_only() -> None:
    assert ESCAPE not in run("probe", "emulated:rng").stdout
    code, text = on_terminal("probe", "emulated:rng")
    assert code == 0 and re.search(r"\x1b\[[\d;]*m", text)
    for more in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        code, text = on_terminal("probe", "emulated:rng", **more)
        assert code == 0 and not re.search(r"\x1b\[(?:3|4|9)\d", text)
    assert ESCAPE not in on_terminal("probe", "emulated:rng", "--json")[1]


@pytest.mark.parametrize("words", [("probe", "emulated:net"), ("probe", "emulated:net", "--json"), ("--help",), ("completion", "bash")])
def test_output_that_nobody_takes_is_no_traceback(words: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(command(*words), stdout=full, stderr=subprocess.PIPE, text=True, timeout=LIMIT, env=environment())
    assert done.returncode == 1 and done.stderr.startswith("virtio: ") and done.stderr.count("\n") == 1, done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command(*words), stdout=writer, stderr=subprocess.PIPE, text=True, timeout=LIMIT, env=environment())
    os.close(writer)
    assert done.returncode == 1 and not done.stderr


@pytest.mark.parametrize("closed", ["0", "1", "2", "01", "02", "12", "012"])
def test_streams_that_are_closed_are_no_traceback(closed: str) -> None:
    shut = " ".join(f"{number}{'<' if number == '0' else '>'}&-" for number in closed)
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {shut}', "sh", *command("probe", "emulated:rng")],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env=environment(),
    )
    if "1" in closed:
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == ("" if "2" in closed else "virtio: cannot write to standard output: it is closed\n")
    else:
        assert done.returncode == 0 and done.stdout == run("probe", "emulated:rng").stdout and not done.stderr


def test_what_the_system_has_no_more_of_is_named() -> None:
    for error, said in (("MemoryError", "no memory is left"), ('RuntimeError("can\'t start new thread")', "no thread can be had")):
        program = (
            f"import sys, virtio.cli.inspect as i\ndef fails(*_): raise {error}\ni.inspect = fails\n"
            "from virtio.cli import main; sys.exit(main(['probe', 'emulated:rng']))"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT, env=environment())
        assert said in failed(done, 1)


def test_text_goes_out_whatever_the_encoding() -> None:
    assert run("probe", "emulated:rng", PYTHONIOENCODING="ascii", LC_ALL="C").stdout == run("probe", "emulated:rng").stdout
    assert "no target" in failed(run("probe", "\udcff:\u2603", PYTHONIOENCODING="ascii"), 2)


def test_an_error_of_our_own_is_one_line_and_a_traceback_for_developers(monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import sys, virtio.cli.inspect as i; i.inspect = lambda *_: 1 / 0; from virtio.cli import main; "
        "sys.exit(main(['probe', 'emulated:rng']))"
    )
    for wanted in ("", "1"):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment(VIRTIO_TRACEBACK=wanted))
        *before, last = done.stderr.splitlines()
        assert done.returncode == 1 and last.startswith("virtio: internal error, ZeroDivisionError")
        assert bool(before) == bool(wanted)


def test_the_group_runs_inside_another_program() -> None:
    runner = CliRunner()
    assert runner.invoke(cli, ["--version"]).output.startswith("virtio ")
    assert runner.invoke(cli, ["completion", "fish"]).exit_code == 0
    assert runner.invoke(cli, ["probe", "nonsense"]).exit_code == 2


def test_only_the_command_imports_click_and_rich() -> None:
    package = Path(__file__).parents[2] / "python/virtio"
    importing = re.compile(r"^\s*(?:import|from) (?:click|rich)\b", flags=re.MULTILINE)
    users = {path.relative_to(package).parts[0] for path in package.rglob("*.py") if importing.search(path.read_text())}
    assert users == {"cli"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_one_line_and_exit_code_1(number: signal.Signals) -> None:
    program = (
        "import os, sys, virtio.cli.inspect as i; i.inspect = lambda *_: (os.write(1, b'.'), __import__('time').sleep(60)); "
        "from virtio.cli import main; sys.exit(main(['probe', 'emulated:rng']))"
    )
    with started([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"."
        process.send_signal(number)
        said = process.communicate(timeout=LIMIT)[1].decode()
        words = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
        assert (process.returncode, said) == (1, f"virtio: {words[number]}\n")


def test_a_signal_whose_exception_gets_lost_ends_the_command_all_the_same() -> None:
    program = (
        "import os, signal, sys, virtio.cli.probe as p\n"
        "class Loses:\n"
        "    def __del__(self): os.kill(os.getpid(), signal.SIGINT)\n"
        "p.Worker.__iter__ = lambda self: iter([Loses()] and [])\n"
        "from virtio.cli import main; sys.exit(main(['probe', 'emulated:rng']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT, env=environment())
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "virtio: interrupted\n")

"""The machine itself: what QEMU refuses, what it dies of, and that nothing of it stays behind."""

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.leftovers import all_closed
from tests.qemu.conftest import How, Machines, at, only
from virtio import EventFd, Memory, NetDriver, StatusError, TransportError
from virtio.devices.rng import RngDriver
from virtio.driver import Driver
from virtio.pci import config
from virtio.pci.qtest import MEMORY_SIZE, QemuMachine
from virtio.transport.pci import PciTransport

pytestmark = pytest.mark.qemu

RNG = "virtio-rng-pci,disable-legacy=on"


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    """Around every test here, and outside `machines`: threads, descriptors and processes are as before."""
    processes = children()
    with all_closed():
        yield
    assert children() == processes


def test_a_machine_has_the_functions_that_were_asked_for(machines: Machines) -> None:
    devices = [f"{RNG},addr=7", "virtio-net-pci,addr=5", "pcie-root-port,id=root1,chassis=1,addr=6", "virtio-blk-pci,bus=root1,drive=d"]
    machine = machines(*devices, options=["-blockdev", "driver=null-co,node-name=d"])
    assert [function.address for function in machine.functions()] == ["0000:00:05.0", "0000:00:07.0", "0000:01:00.0"]
    for function in machine.functions():
        assert function.config_read(config.VENDOR_ID, 2) == 0x1AF4
        assert function.memory is machine.memory and machine.memory.size == MEMORY_SIZE
        modern = function.bars[4]
        assert (modern.kind, modern.size, modern.prefetchable) == ("memory64", 16384, True)
        assert modern.address >= 1 << 32 and modern.address % modern.size == 0


def test_bars_do_not_overlap(machines: Machines) -> None:
    devices = [f"pcie-root-port,id=root{number},chassis={number},addr={number + 2:x}.0" for number in range(1, 9)]
    devices += [f"virtio-net-pci,bus=root{number}" for number in range(1, 9)]
    devices += [f"virtio-rng-pci,addr={number:x}" for number in range(0x10, 0x18)]
    machine = machines(*devices)
    assert len(machine.functions()) == 16
    for kinds in ({"io"}, {"memory32", "memory64"}):
        bars = [bar for function in machine.functions() for bar in function.bars.values() if bar.kind in kinds]
        spans = sorted((bar.address, bar.address + bar.size) for bar in bars)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert len(spans) >= 16 if "io" not in kinds else spans
    for function in machine.functions():
        with at(machine, function.address) as transport:
            assert transport.device_id in (1, 4)


def test_the_pc_has_its_functions_by_ports(machines: Machines) -> None:
    machine = machines("virtio-rng-pci", "e1000", machine="pc")
    assert [function.config_read(config.VENDOR_ID, 4) for function in machine.functions()] == [0x10051AF4, 0x100E8086]
    with pytest.raises(ValueError, match="no extended"):
        machine.functions()[0].config_read(0x100, 4)


def test_io_bars_are_read_and_written(machines: Machines) -> None:
    """The legacy interface's device status, at offset 18 of BAR 0 (4.1.4.8)."""
    (function,) = machines("virtio-rng-pci,disable-modern=on,addr=4").functions()
    assert function.bars[0].kind == "io"
    function.bar_write(0, 18, 1, 1)
    assert function.bar_read(0, 18, 1) == 1
    with pytest.raises(TransportError, match="legacy"):
        PciTransport(function)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (["virtio-rng-pci,no_such=1"], "no_such"),
        (["no-such-device"], "no-such-device"),
        (["virtio-net-pci,netdev=nobody"], "nobody"),
        ([RNG, f"{RNG},bus=nowhere"], "nowhere"),
    ],
)
def test_an_option_that_qemu_refuses_shows_its_message(binary: str, devices: list[str], message: str) -> None:
    with pytest.raises(TransportError, match=rf"QEMU ended with status 1: qemu-system-x86_64: .*{message}"):
        QemuMachine(devices, binary=binary)


def test_a_program_that_is_missing_is_named() -> None:
    with pytest.raises(TransportError, match=r"no-such-qemu not found: install the Debian package qemu-system-x86"):
        QemuMachine(binary="no-such-qemu")


def test_a_program_that_is_none_of_qemus_is_an_error() -> None:
    with pytest.raises(TransportError, match="QEMU ended with status 1"):
        QemuMachine(binary="false")


@pytest.mark.parametrize(
    "options", [{"machine": "microvm"}, {"memory_size": 4096}, {"memory_size": 1 << 32}, {"memory_size": (1 << 24) + 1}]
)
def test_what_no_machine_can_be_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"machine|memory size"):
        QemuMachine(**options)  # type: ignore[arg-type]


def test_only_the_machines_own_memory_is_reached(machines: Machines) -> None:
    machine = machines(RNG)
    (function,) = machine.functions()
    with Memory(1 << 20) as other, pytest.raises(ValueError, match="own RAM only"):
        function.attach(other)
    assert function.attach(machine.memory) == 0
    with pytest.raises(ValueError, match="already"):
        function.attach(machine.memory)
    function.detach(machine.memory)
    with pytest.raises(ValueError, match="not attached"):
        function.detach(machine.memory)


def test_wrong_accesses_are_refused_and_change_nothing(machines: Machines) -> None:
    (function,) = machines(RNG).functions()
    for call in (
        lambda: function.config_read(1, 2),
        lambda: function.config_read(4096, 4),
        lambda: function.config_read(0, 3),
        lambda: function.config_write(4, 2, 0x1_0000),
        lambda: function.config_write(4, 2, -1),
        lambda: function.bar_read(3, 0, 4),
        lambda: function.bar_read(4, 16384, 1),
        lambda: function.bar_write(4, 2, 4, 0),
        lambda: function.doorbell(4, -2, 2, 0),
        lambda: function.mask_vector(0, True),
    ):
        with pytest.raises(ValueError, match=r"."):
            call()
    with pytest.raises(TransportError, match="vectors"):
        function.enable_msix(1000)
    function.enable_msix(2)
    with pytest.raises(StatusError):
        function.enable_msix(1)
    with pytest.raises(StatusError):
        function.enable_intx(lambda: None)


def test_masked_vectors_are_signalled_when_unmasked(machines: Machines) -> None:
    machine = machines(RNG)
    (function,) = machine.functions()
    with only(machine, "msix") as transport, RngDriver(transport) as rng:
        rng.read(8)
        function.mask_vector(1, True)
        with pytest.raises(TimeoutError):
            rng_only_by_interrupt(rng)
        function.mask_vector(1, False)
        assert rng.transport.interrupt(0).wait(60.0), "what was pending comes"


def rng_only_by_interrupt(rng: RngDriver) -> None:
    queue = rng.requestq
    rng.transport.interrupt(0).drain()
    queue.arm()
    queue.add(None, writable=[(rng.address + rng.buffer, 8)])
    queue.publish()
    while not queue.pop_used():  # done, as the ring says
        if not rng.transport.interrupt(0).wait(0.05) and queue.arm():
            raise TimeoutError("used, but no interrupt")


@pytest.mark.parametrize("interrupts", ["msix", "intx"])
def test_qemu_killed_in_the_middle_wakes_who_waits(machines: Machines, interrupts: How) -> None:
    machine = machines(RNG, "virtio-net-pci,disable-legacy=on")
    transport = at(machine, machine.functions()[-1].address, interrupts)
    driver = Driver(transport)
    driver.negotiate()
    driver.setup_queue(0)
    driver.driver_ok()
    asleep = threading.Event()
    seen: list[BaseException] = []

    def wait() -> None:
        asleep.set()
        try:
            while True:
                driver.wait(60.0)
        except TransportError as error:
            seen.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    asleep.wait()
    os.kill(machine.pid, signal.SIGKILL)
    thread.join(60)
    assert not thread.is_alive() and len(seen) == 1
    assert "signal 9" in str(seen[0])
    for call in (
        lambda: driver.check(),
        lambda: transport.offered(),
        lambda: machine.functions()[0].config_read(0, 4),
        lambda: machine.qmp("query-status"),
        lambda: driver.close(),
    ):
        with pytest.raises(TransportError, match="signal 9"):
            call()
    driver.close()
    transport.close()


@pytest.mark.parametrize("interrupts", ["msix", "intx"])
@pytest.mark.parametrize("line", ["IRQ raise nonsense", "IRQ lower \x00"])
def test_a_line_that_is_none_of_qtests_is_named_and_wakes_who_waits(machines: Machines, interrupts: How, line: str) -> None:
    machine = machines(RNG)
    with only(machine, interrupts) as transport:
        driver = RngDriver(transport)
        asleep = threading.Event()
        seen: list[BaseException] = []

        def wait() -> None:
            asleep.set()
            try:
                while True:
                    driver.wait(60.0)
            except TransportError as error:
                seen.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        asleep.wait()
        machine._qtest._lines._rest += f"{line}\n".encode()
        with pytest.raises(TransportError, match="no line of that protocol: 'IRQ"):
            _ = transport.status
        thread.join(60)
        assert not thread.is_alive() and "no line of that protocol" in str(seen[0])
        with pytest.raises(TransportError, match="no line of that protocol"):
            driver.close()
        driver.close()


@pytest.mark.parametrize("line", ["nonsense", "[1]", "[" * 100_000, '{"return"', "7"])
def test_a_line_that_is_none_of_the_monitors_is_named(machines: Machines, line: str) -> None:
    machine = machines(RNG)
    machine._qmp._lines._rest += f"{line}\n".encode()
    with pytest.raises(TransportError, match="no message of that protocol"):
        machine.qmp("query-status")


def test_a_helper_that_fails_wakes_who_waits_and_tells_why(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = machines(RNG)
    with only(machine, "intx") as transport:
        driver = RngDriver(transport)

        def fail() -> None:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(machine._helper, "_step", fail)
        machine._helper._wake.signal()
        assert transport.interrupt(0).wait(60), "whoever waits is woken"
        machine._helper.join(60)
        with pytest.raises(TransportError, match="Too many open files"):
            driver.wait(60)
        with pytest.raises(TransportError, match="Too many open files"):
            driver.close()
        driver.close()


def test_a_handler_that_fails_is_told_and_wakes_who_waits(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    died: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr("threading.excepthook", died.append)
    machine = machines("virtio-net-pci,disable-legacy=on,id=card")
    with only(machine, "intx") as transport, Driver(transport) as driver:
        driver.negotiate(wanted={16})  # STATUS
        driver.setup_queue(0)
        driver.driver_ok()

        def fail() -> int:
            raise RuntimeError("a mistake")

        transport._interrupts._read_isr = fail
        machine.qmp("set_link", name="card", up=False)
        assert transport.interrupt(0).wait(60) and transport.config_interrupt.wait(60)
        driver.check()  # others are served as before
    assert [str(each.exc_value) for each in died] == ["a mistake"]


def test_qemu_killed_inside_blocks_is_said_so(binary: str) -> None:
    with (
        pytest.raises(TransportError, match="signal 9"),
        QemuMachine(["virtio-net-pci,netdev=n0,disable-legacy=on"], wires=["n0"], binary=binary) as machine,
        only(machine) as transport,
        NetDriver(transport) as net,
    ):
        os.kill(machine.pid, signal.SIGKILL)
        while True:
            net.send_frames([bytes(60)])
            net.wait(1)


def test_queues_are_given_back_at_once_when_qemu_is_dead(machines: Machines) -> None:
    machine = machines("virtio-net-pci,disable-legacy=on")
    transport = only(machine)
    net = NetDriver(transport)
    assert not transport.gone
    os.kill(machine.pid, signal.SIGKILL)
    with pytest.raises(TransportError, match="signal 9"):
        net.close()
    assert transport.gone and not net.queues
    transport.close()
    machine.close()
    assert machine.memory.closed


def test_what_is_on_its_way_is_not_replaced_when_the_ram_is_in_use(binary: str) -> None:
    with pytest.raises(ZeroDivisionError), QemuMachine([RNG], binary=binary) as machine:
        view = memoryview(machine.memory)
        raise ZeroDivisionError
    view.release()
    machine.close()
    assert machine.memory.closed


def test_everything_is_closed_with_the_machine(machines: Machines) -> None:
    machine = machines(RNG, wires=["n0"])
    (function,) = machine.functions()
    doorbell = function.doorbell(4, 0x3000, 2, 0)
    vectors = function.enable_msix(2)
    machine.close()
    machine.close()
    for event in (doorbell, *vectors):
        assert isinstance(event, EventFd)
        with pytest.raises(StatusError):
            event.fileno()
    for call in (lambda: function.config_read(0, 4), lambda: function.enable_msix(1), lambda: machine.qmp("query-status")):
        with pytest.raises(StatusError):
            call()
    function.close()
    assert machine.memory.closed


def test_ram_in_use_stays_until_it_is_closed_again(machines: Machines) -> None:
    machine = machines(RNG)
    view = memoryview(machine.memory)
    with pytest.raises(BufferError):
        machine.close()
    assert not children() and not machine.memory.closed
    view.release()
    machine.close()
    assert machine.memory.closed


def test_the_monitor_answers_and_refuses(machines: Machines) -> None:
    machine = machines(RNG)
    assert machine.qmp("query_status")["status"] == "running"
    with pytest.raises(ValueError, match="no-such-command"):
        machine.qmp("no-such-command")
    assert machine.qmp("query-version")["qemu"]["major"] in (7, 10)


def test_no_interrupt_handler_runs_after_it_was_disabled(machines: Machines) -> None:
    machine = machines("virtio-net-pci,disable-legacy=on,id=card")
    with only(machine, "intx") as transport, Driver(transport) as driver:
        driver.negotiate(wanted={16})  # STATUS
        driver.driver_ok()
        machine.qmp("set_link", name="card", up=False)
        assert transport.config_interrupt.wait(60)
        transport.function.disable_interrupts()
        transport.config_interrupt.drain()
        machine.qmp("set_link", name="card", up=True)
        assert driver.read_config(6, 2) == b"\1\0"  # an answer behind the interrupt that is not to be heard
        assert not transport.config_interrupt.drain()


def ended(pid: int) -> bool:
    """Whether a process of somebody else's ends, which its pidfd tells."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        watch = select.poll()
        watch.register(process, select.POLLIN)
        return bool(watch.poll(60_000))
    finally:
        os.close(process)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_qemu_ends_when_its_user_is_killed(binary: str, how: signal.Signals) -> None:
    program = (
        "import sys, time\nfrom virtio.pci.qtest import QemuMachine\n"
        f"machine = QemuMachine(['virtio-rng-pci'], binary={binary!r})\nprint(machine.pid, flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as user:
        assert user.stdout is not None
        pid = int(user.stdout.readline())
        user.send_signal(how)
        user.wait(60)
    assert ended(pid)


def test_qemu_ends_with_its_user_where_setpriv_is_missing(binary: str, tmp_path: Path) -> None:
    program = (
        "import time\nfrom virtio.pci.qtest import QemuMachine\n"
        f"machine = QemuMachine(['virtio-rng-pci'], binary={binary!r})\nprint(machine.pid, flush=True)\ntime.sleep(60)\n"
    )
    environment = {**os.environ, "PATH": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment) as user:
        assert user.stdout is not None
        pid = int(user.stdout.readline())
        user.send_signal(signal.SIGKILL)
        user.wait(60)
    assert ended(pid)


def test_a_program_that_forgets_to_close_ends_nevertheless(binary: str) -> None:
    program = (
        f"from virtio.pci.qtest import QemuMachine\nmachine = QemuMachine(['virtio-rng-pci'], binary={binary!r})\nprint(machine.pid)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert not done.stderr
    assert ended(int(done.stdout))

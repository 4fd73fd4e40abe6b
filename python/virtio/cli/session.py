"""What `virtio demo` does, in its worker: the device, its driver, `vn0` and `peer0`, ping and iperf3. It tells all by events."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from virtio.cli.inspect import inspect
from virtio.cli.programs import DRIVER, PEER, Here, Programs
from virtio.cli.worker import Emit
from virtio.devices.net import CHECKSUMS, GUEST_OFFLOADS, HOST_OFFLOADS, WANTED, NetDevice, NetDriver, NetFeature
from virtio.features import Features
from virtio.netdev import SLOT_SIZE, Namespace, Netdev, open_tap
from virtio.netdev.tap import Interface
from virtio.pci.emulated import EmulatedFunction
from virtio.spec import Feature
from virtio.transport.pci import PciTransport

if TYPE_CHECKING:
    from virtio import DeviceQueue, DriverQueue
    from virtio.netdev import NetdevPair
    from virtio.pci.function import PciFunction

OFFLOADS: Final = GUEST_OFFLOADS | HOST_OFFLOADS | CHECKSUMS
"""What --no-offloads leaves out."""
POOL: Final = {True: (128, SLOT_SIZE), False: (1024, 2048)}
"""Slots and their size: with offloads a slot holds 64 KiB in one piece, and few of these stay in the cache."""


class Wishes(NamedTuple):
    """What the command line asked for."""

    qemu: bool
    packed: bool
    offloads: bool
    seconds: int


def session(wishes: Wishes, emit: Emit) -> None:
    """The whole of it, from probing to the last figures. CommandError, VirtioError, OSError: why it ended early."""
    with ExitStack() as stack:
        near, far = stack.enter_context(Namespace()), stack.enter_context(Namespace())
        os.close(open_tap(DRIVER[0], namespace=near.fileno()))  # what keeps us from it is told first
        device: NetDevice | None = None
        function: PciFunction
        if wishes.qemu:
            function = _start_qemu(stack, far, wishes)
        else:
            device = NetDevice()
            function = EmulatedFunction(device)
        transport = stack.enter_context(PciTransport(function))
        report = inspect(transport, "qemu:virtio-net-pci" if wishes.qemu else "emulated:net")
        emit("device", report=report)
        wanted = WANTED if wishes.offloads else WANTED - OFFLOADS
        if not wishes.packed:
            wanted = wanted - {Feature.RING_PACKED}
        required = {Feature.RING_PACKED} if wishes.packed else set()
        slots, slot_size = POOL[wishes.offloads]
        net = stack.enter_context(NetDriver(transport, wanted=wanted, required=required, slots=slots, slot_size=slot_size))
        accepted = Features(net.features, names=[NetFeature])
        emit(
            "driver",
            accepted=[{"bit": int(bit), "name": getattr(bit, "name", None)} for bit in accepted],
            mac=net.mac.hex(":"),
            mtu=net.mtu,
            link=net.link,
            queues=[net.receiveq.size, net.transmitq.size],
            format="packed" if Feature.RING_PACKED in accepted else "split",
        )
        vn0 = stack.enter_context(Netdev(net, DRIVER[0], namespace=near, address=f"{DRIVER[1]}/24"))
        running: Netdev | NetdevPair = vn0
        if device is not None:
            peer0 = stack.enter_context(Netdev(device, PEER[0], namespace=far, mtu=net.mtu, address=f"{PEER[1]}/24"))
            running = stack.enter_context(Netdev.pair(vn0, peer0))
        running.start()
        emit("up", name=DRIVER[0], address=DRIVER[1], peer=PEER[0], peer_address=PEER[1])
        run = Programs(emit, Here(near, running.check), Here(far, running.check))
        ping = run.ping()
        rates = run.iperf3(wishes.seconds)
        running.check()
        ours = vn0.statistics
        kernel = far.counters(PEER[0])
        emit(
            "result",
            ping=ping,
            iperf3=rates,
            vn0=_figures(ours["transmit"], ours["receive"], [net.transmitq, net.receiveq]),
            peer0=_swapped(kernel) if device is None else device_figures(device, peer0.statistics),
            tap_drops=[ours["receive"]["refused"]] + ([] if device is None else [peer0.statistics["transmit"]["refused"]]),
        )


def _figures(sent: dict[str, Any], received: dict[str, Any], queues: "Sequence[DriverQueue | DeviceQueue]") -> dict[str, Any]:
    """What one end did, by the names of `Port.statistics`."""
    counters = [queue.counters for queue in queues]
    return {
        **{f"sent_{key}": sent[key] for key in ("frames", "bytes", "drops")},
        **{f"received_{key}": received[key] for key in ("frames", "bytes", "drops")},
        **{key: sum(each[key] for each in counters) for key in ("notified", "suppressed")},
    }


def device_figures(device: NetDevice, counted: dict[str, Any]) -> dict[str, Any]:
    """A device sends to receiveq1, and receives from transmitq1."""
    queues = [queue for index in (0, 1) if (queue := device.queue(index)) is not None]
    return _figures(counted["receive"], counted["transmit"], queues)


def _start_qemu(stack: ExitStack, far: Namespace, wishes: Wishes) -> "PciFunction":
    """QEMU's device, and `peer0` as its far end, up and with its address."""
    from virtio.pci.qtest import QemuMachine

    tap = open_tap(PEER[0], namespace=far.fileno())
    stack.callback(os.close, tap)
    interface = Interface(PEER[0], far.fileno())
    interface.add_addresses([f"{PEER[1]}/24"])
    interface.up()
    options = "packed=on," if wishes.packed else ""
    machine = QemuMachine(
        [f"virtio-net-pci,netdev=peer,{options}rx_queue_size=1024,tx_queue_size=256,disable-legacy=on"],
        netdevs=[f"tap,id=peer,fd={tap},vhost=off"],
        pass_fds=[tap],
    )
    stack.enter_context(machine)
    (function,) = machine.functions()
    return function


def _swapped(kernel: dict[str, int]) -> dict[str, int]:
    """What the kernel's interface received is what the far end sent to it, and was received from the driver by that end."""
    return {
        "sent_frames": kernel["sent_frames"],
        "sent_bytes": kernel["sent_bytes"],
        "received_frames": kernel["received_frames"],
        "received_bytes": kernel["received_bytes"],
    }

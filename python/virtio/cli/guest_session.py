"""What `virtio demo --guest` does, in its worker: a Linux guest whose own driver has our network device, over vhost-user."""

import ctypes
import os
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any, Final, NamedTuple

from virtio.cli.guest import Guest, qemu_guest, uml_guest
from virtio.cli.initrd import find_kernel
from virtio.cli.inspect import inspect
from virtio.cli.output import CommandError
from virtio.cli.programs import DRIVER, PEER, Here, InGuest, Programs
from virtio.cli.session import OFFLOADS, device_figures
from virtio.cli.worker import Emit
from virtio.device import RING_FEATURES
from virtio.devices.net import NetDevice, NetFeature
from virtio.features import Features
from virtio.netdev import Namespace, Netdev
from virtio.spec import DeviceId, Feature
from virtio.transport.loopback import LoopbackTransport
from virtio.vhost_user.backend import Backend

SHARED_MEMORY: Final = Path("/dev/shm")
BOOT_SECONDS: Final = {"uml": 2, "qemu": 5}
"""What a boot takes, about."""
_MS_REC_PRIVATE: Final = 0x4000 | 1 << 18
_PROBED: Final = "dmesg | grep -iE 'virtio|1af4' | grep -v 'command line'"
_COUNTERS: Final = {
    "sent_frames": "tx_packets",
    "sent_bytes": "tx_bytes",
    "sent_drops": "tx_dropped",
    "received_frames": "rx_packets",
    "received_bytes": "rx_bytes",
    "received_drops": "rx_dropped",
}


class GuestWishes(NamedTuple):
    """What the command line asked for: the kind of guest, "uml" or "qemu", where its kernel is (None: look for it), and the rest."""

    guest: str
    kernel: Path | None
    packed: bool
    offloads: bool
    seconds: int


def guest_session(wishes: GuestWishes, emit: Emit) -> None:
    """The whole of it, from boot to the last figures. CommandError, VirtioError, OSError: why it ended early."""
    errors: list[Exception] = []
    with ExitStack() as stack:
        far = stack.enter_context(Namespace())
        device = NetDevice(offered=_offered(wishes))
        with LoopbackTransport(device) as transport:
            emit("device", report=inspect(transport, "vhost-user:net"))
        peer0 = stack.enter_context(Netdev(device, PEER[0], namespace=far, address=f"{PEER[1]}/24"))
        peer0.follow(errors.append)

        def check() -> None:
            peer0.check()
            if errors:
                raise CommandError(str(errors[0]))

        guest = stack.enter_context(_start(stack, device, wishes, errors.append, check))
        emit("step", title="Linux starts", seconds=BOOT_SECONDS[wishes.guest], command=shlex.join(guest.words))
        guest.wait_ready()
        _bring_up(guest, emit)
        emit("driver", **_driver(guest, device, wishes))
        emit("up", name=DRIVER[0], address=DRIVER[1], peer=PEER[0], peer_address=PEER[1])
        run = Programs(emit, InGuest(guest), Here(far, check))
        ping = run.ping()
        rates = run.iperf3(wishes.seconds)
        check()
        files = [f"/sys/class/net/{DRIVER[0]}/statistics/{name}" for name in _COUNTERS.values()]
        counted = [int(each) for each in guest.read(f"cat {' '.join(files)}").split()]
        emit(
            "result",
            ping=ping,
            iperf3=rates,
            vn0=dict(zip(_COUNTERS, counted, strict=True)),
            peer0=device_figures(device, peer0.statistics),
            tap_drops=[peer0.statistics["transmit"]["refused"]],
        )


def _offered(wishes: GuestWishes) -> Features:
    """What the device offers: of rings one format, so that the driver has no choice."""
    features = (RING_FEATURES | Features(NetDevice.features)) - {NetFeature.MTU, NetFeature.SPEED_DUPLEX}
    if not wishes.packed:
        features = features - {Feature.RING_PACKED}
    return features if wishes.offloads else features - OFFLOADS


def _start(
    stack: ExitStack, device: NetDevice, wishes: GuestWishes, report: Callable[[Exception], object], check: Callable[[], object]
) -> Guest:
    """The guest, with a back-end of the device running."""
    folder = _private_folder()
    path = str(folder / "net")
    _serve(stack, Backend(path, device, report=report), report)
    if wishes.guest == "uml":
        return uml_guest(folder, {path: DeviceId.NETWORK}, check=check)
    words = ["-chardev", f"socket,id=back,path={path}", "-netdev", "vhost-user,id=peer,chardev=back"]
    words += ["-device", f"virtio-net-pci,netdev=peer,mac={device.mac.hex(':')},romfile={',packed=on' if wishes.packed else ''}"]
    return qemu_guest(find_kernel(wishes.kernel), words, check=check)


def _serve(stack: ExitStack, backend: Backend, report: Callable[[Exception], object]) -> None:
    """Serves in a thread until the stack unwinds."""

    def serve() -> None:
        try:
            backend.serve()
        except Exception as error:
            report(error)

    thread = Thread(target=serve, name="virtio-back-end", daemon=True)
    stack.callback(backend.close)
    stack.callback(thread.join)
    stack.callback(backend.stop)
    thread.start()


def _private_folder() -> Path:
    """A file system in memory that ends with this process's mount namespace: whatever lies there, nothing is left."""
    libc = ctypes.CDLL(None, use_errno=True)
    for source, target, kind, flags in ((b"none", b"/", None, _MS_REC_PRIVATE), (b"virtio", bytes(SHARED_MEMORY), b"tmpfs", 0)):
        if libc.mount(source, target, kind, ctypes.c_ulong(flags), None):
            raise OSError(number := ctypes.get_errno(), f"mount on {os.fsdecode(target)}: {os.strerror(number)}")
    return SHARED_MEMORY


def _bring_up(guest: Guest, emit: Emit) -> None:
    """Names the card, gives it its address, and shows what Linux says of it."""
    name, address = DRIVER
    interfaces = guest.read("ls -1 /sys/bus/virtio/devices/*/net 2>/dev/null || true").split()
    if not interfaces:
        raise CommandError("Linux found no network card in the guest")
    guest.read(f"ip link set {interfaces[-1]} name {name} && ip link set {name} up && ip addr add {address}/24 dev {name}")
    emit("guest", release=guest.read("uname -r"), lines=guest.run(_PROBED)[1])


def _driver(guest: Guest, device: NetDevice, wishes: GuestWishes) -> dict[str, Any]:
    """What Linux's driver negotiated."""
    folder = f"/sys/class/net/{DRIVER[0]}"
    bits, mac, mtu, carrier = guest.read(f"cat {folder}/device/features {folder}/address {folder}/mtu {folder}/carrier").split()
    accepted = Features([index for index, bit in enumerate(bits) if bit == "1"], names=[NetFeature])
    if wishes.packed and Feature.RING_PACKED not in accepted:
        raise CommandError("Linux did not accept packed rings")
    queues = [queue for index in (0, 1) if (queue := device.queue(index)) is not None]
    return {
        "accepted": [{"bit": int(bit), "name": getattr(bit, "name", None)} for bit in accepted],
        "mac": mac,
        "mtu": int(mtu),
        "link": carrier == "1",
        "queues": [queue.size for queue in queues],
        "format": "packed" if Feature.RING_PACKED in accepted else "split",
    }

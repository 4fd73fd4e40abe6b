"""Device types, for people to read: names of features, configuration fields and queues (VIRTIO 1.4, chapter 5). A type is one entry."""

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, Final, NamedTuple

from virtio.features import Features
from virtio.spec import DeviceId

TYPES: Final[dict[int, str]] = {
    DeviceId.NETWORK: "net",
    DeviceId.BLOCK: "block",
    DeviceId.CONSOLE: "console",
    DeviceId.ENTROPY: "rng",
    DeviceId.TRADITIONAL_BALLOON: "balloon",
    DeviceId.RPMSG: "rpmsg",
    DeviceId.SCSI_HOST: "scsi",
    DeviceId.TRANSPORT_9P: "9p",
    DeviceId.RPROC_SERIAL: "rproc-serial",
    DeviceId.CAIF: "caif",
    DeviceId.MEMORY_BALLOON: "balloon",
    DeviceId.GPU: "gpu",
    DeviceId.INPUT: "input",
    DeviceId.SOCKET: "vsock",
    DeviceId.CRYPTO: "crypto",
    DeviceId.FILE_SYSTEM: "fs",
}
"""Device types as QEMU's vhost-user.json calls them, by number."""


class ConfigField(NamedTuple):
    """A field of the configuration: bytes at an offset, there if one of these features is offered (always, if there are none)."""

    name: str
    offset: int
    length: int
    features: tuple[int, ...] = ()
    show: Callable[[bytes], Any] = lambda data: int.from_bytes(data, "little")


class Kind(NamedTuple):
    """What is known of a device type."""

    name: str
    features: tuple[type[IntEnum], ...] = ()
    config: Sequence[ConfigField] | None = None
    """None: the layout is not known here."""
    queues: Callable[[int, Features], Sequence[str]] = lambda count, offered: ()
    """Names of the queues of a device that has so many and offers this; further ones have none."""


def mac_text(data: bytes) -> str:
    """An Ethernet address as one writes it."""
    return data.hex(":")


def _net() -> Kind:
    from virtio.devices.net import NetFeature as F

    fields = (
        ConfigField("mac", 0, 6, (F.MAC,), mac_text),
        ConfigField("status", 6, 2, (F.STATUS,)),
        ConfigField("max_virtqueue_pairs", 8, 2, (F.MQ, F.RSS)),
        ConfigField("mtu", 10, 2, (F.MTU,)),
        ConfigField("speed", 12, 4, (F.SPEED_DUPLEX,)),
        ConfigField("duplex", 16, 1, (F.SPEED_DUPLEX,)),
        ConfigField("rss_max_key_size", 17, 1, (F.RSS, F.HASH_REPORT)),
        ConfigField("rss_max_indirection_table_length", 18, 2, (F.RSS,)),
        ConfigField("supported_hash_types", 20, 4, (F.RSS, F.HASH_REPORT)),
        ConfigField("supported_tunnel_types", 24, 4, (F.HASH_TUNNEL,)),
    )

    def queues(count: int, offered: Features) -> Sequence[str]:
        names = [f"{way}q{pair + 1}" for pair in range(max(1, count // 2)) for way in ("receive", "transmit")]
        return [*names, "controlq"] if count % 2 and F.CTRL_VQ in offered else names

    return Kind("virtio-net", (F,), fields, queues)


def _rng() -> Kind:
    return Kind("virtio-rng", (), (), lambda count, offered: ("requestq",))


def _blk() -> Kind:
    fields = (ConfigField("capacity", 0, 8), ConfigField("blk_size", 20, 4, (6,)), ConfigField("num_queues", 34, 2, (12,)))
    return Kind("virtio-blk", (), fields, lambda count, offered: [f"requestq{index + 1}" for index in range(max(1, count))])


def _unknown() -> Kind:
    return Kind("virtio device", (), ())


_KINDS: Final[dict[int, Callable[[], Kind]]] = {DeviceId.NETWORK: _net, DeviceId.ENTROPY: _rng, DeviceId.BLOCK: _blk, 0: _unknown}


def kind_of(device_id: int) -> Kind:
    """What is known of a type; at least a name."""
    if device_id in _KINDS:
        return _KINDS[device_id]()
    if device_id in DeviceId._value2member_map_:
        return Kind(f"virtio-{DeviceId(device_id).name.lower().replace('_', '-')}")
    return Kind(f"virtio device of type {device_id}")

"""A device as values that JSON can say: what `virtio probe` shows, and the first lines of `virtio demo`."""

from collections.abc import Mapping
from contextlib import suppress
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final

from virtio.cli.kinds import Kind, kind_of
from virtio.driver import Driver
from virtio.features import Features
from virtio.pci import config
from virtio.pci.config import CfgType, Common
from virtio.pci.function import Bar
from virtio.spec import DeviceId

if TYPE_CHECKING:
    from virtio.pci.function import PciFunction
    from virtio.transport import Transport
    from virtio.transport.pci import PciTransport
    from virtio.transport.vhost_user import VhostUserTransport

CAPABILITY_NAMES: Final = {0x01: "PM", 0x05: "MSI", 0x09: "VENDOR", 0x10: "PCI_EXPRESS", 0x11: "MSI-X"}

Report = dict[str, Any]


class FeatureBit(IntEnum):
    """Bits of a vhost-user back-end's features that are not the device's."""

    LOG_ALL = 26
    PROTOCOL_FEATURES = 30


def inspect(transport: "Transport", target: str) -> Report:
    """All that a driver can find out without negotiating. The device is reset before and after. VirtioError: it does not answer."""
    from virtio.transport.pci import PciTransport
    from virtio.transport.vhost_user import VhostUserTransport

    with Driver(transport) as driver:
        driver.acknowledge()
        pci = transport if isinstance(transport, PciTransport) else None
        user = transport if isinstance(transport, VhostUserTransport) else None
        offered = raw_features(pci) if pci is not None else user.frontend.offered if user is not None else transport.offered()
        kind = kind_of(transport.device_id)
        offered = Features(offered, names=(*kind.features, *((FeatureBit,) if user is not None else ())))
        number = transport.device_id
        count = pci.num_queues if pci is not None else _count(transport) if user is None else user.num_queues
        if count is None:  # nobody told: those that every device of the type has
            count = len(kind.queues(0, offered))
        names = kind.queues(count, offered)
        return {
            "target": target,
            "device": {"type": number, "name": kind.name, "id": DeviceId(number).name if number in DeviceId._value2member_map_ else None},
            "pci": None if pci is None else describe_pci(pci),
            "vhost_user": None if user is None else describe_vhost_user(user),
            "features": {"mask": f"{int(offered):#x}", "offered": [_bit(bit) for bit in offered]},
            "config": read_config(driver, kind, offered, config_size(transport)) if user is None else read_fields(driver, kind, offered),
            "queues": [
                {
                    "index": index,
                    "name": names[index] if index < len(names) else None,
                    "size": transport.queue_max(index) if user is None else None,
                }
                for index in range(count)
            ],
        }


def raw_features(transport: "PciTransport") -> Features:
    """The device's feature bits as its registers have them, also those that the transport leaves out."""
    function, common = transport.function, transport.layout.common
    words = []
    for select in range(4):
        function.bar_write(common.bar, common.offset + Common.DEVICE_FEATURE_SELECT.offset, 4, select)
        words.append(function.bar_read(common.bar, common.offset + Common.DEVICE_FEATURE.offset, 4))
    return Features.from_words(words)


def config_size(transport: "Transport") -> int:
    """Bytes of the device's configuration, as far as the transport tells."""
    layout = getattr(transport, "layout", None)
    return 0 if layout is None or layout.device is None else int(layout.device.length)


def read_config(driver: Driver, kind: Kind, offered: Features, size: int) -> Report:
    """Fields by name; of a type whose layout is not known here, all bytes."""
    if kind.config is None:
        return {"bytes": driver.read_config(0, min(size, 256)).hex()} if size else {}
    return {
        field.name: field.show(driver.read_config(field.offset, field.length))
        for field in kind.config
        if field.offset + field.length <= size and (not field.features or any(bit in offered for bit in field.features))
    }


def read_fields(driver: Driver, kind: Kind, offered: Features) -> Report:
    """Fields by name, as far as the back-end has them: nobody tells how long its configuration is."""
    found: Report = {}
    for field in kind.config or ():
        if not field.features or any(bit in offered for bit in field.features):
            with suppress(ValueError):
                found[field.name] = field.show(driver.read_config(field.offset, field.length))
    return found


def describe_vhost_user(transport: "VhostUserTransport") -> Report:
    """What the connection tells beside the device."""
    frontend = transport.frontend
    return {
        "protocol_features": {
            "mask": f"{int(frontend.offered_protocol):#x}",
            "offered": [_bit(bit) for bit in frontend.offered_protocol],
        },
        "queues": frontend.queues,
        "memory_slots": frontend.slots,
    }


def describe_pci(transport: "PciTransport") -> Report:
    """The PCI function: place, ids, resources, capabilities."""
    function = transport.function
    space = config_space(function)

    def number(offset: int, width: int) -> int:
        return int.from_bytes(space[offset : offset + width], "little")

    msix = transport.layout.msix
    return {
        "address": function.address,
        "vendor": number(config.VENDOR_ID, 2),
        "device": number(config.DEVICE_ID, 2),
        "revision": number(config.REVISION, 1),
        "class": number(config.CLASS_CODE, 3),
        "subsystem_vendor": number(config.SUBSYSTEM_VENDOR_ID, 2),
        "subsystem": number(config.SUBSYSTEM_ID, 2),
        "bars": [bar_report(bar) for _, bar in sorted(function.bars.items())],
        "interrupts": {
            "used": "msix" if transport.vectors else "intx",
            "msix_vectors": 0 if msix is None else msix.size,
            "pin": number(config.INTERRUPT_PIN, 1),
        },
        "capabilities": [capability_report(capability, function.bars) for capability in config.capabilities(space)],
        "unusable": list(transport.layout.skipped),
    }


def config_space(function: "PciFunction") -> bytes:
    """The 256 bytes of configuration space."""
    return b"".join(function.config_read(offset, 4).to_bytes(4, "little") for offset in range(0, config.SPACE_SIZE, 4))


def bar_report(bar: Bar) -> Report:
    """A BAR by its names."""
    return {"index": bar.index, "kind": bar.kind, "address": bar.address, "size": bar.size, "prefetchable": bar.prefetchable}


def capability_report(capability: config.Capability, bars: Mapping[int, Bar]) -> Report:
    """A capability; virtio's own with its type and location, MSI-X with its table."""
    report: Report = {"place": capability.place, "id": capability.id, "name": CAPABILITY_NAMES.get(capability.id)}
    try:
        if capability.id == config.CAP_MSIX:
            msix = config.parse_msix(capability, bars)
            report["msix"] = {
                "vectors": msix.size,
                "table": {"bar": msix.table_bar, "offset": msix.table_offset},
                "pending": {"bar": msix.pending_bar, "offset": msix.pending_offset},
            }
        elif capability.id == config.CAP_VENDOR:
            structure = config.parse_structure(capability, bars)
            if structure is not None:
                report["virtio"] = {
                    "type": CfgType(structure.cfg_type).name,
                    "bar": structure.bar,
                    "offset": structure.offset,
                    "length": structure.length,
                }
                if structure.cfg_type == CfgType.NOTIFY:
                    report["virtio"]["notify_off_multiplier"] = structure.multiplier
    except ValueError as error:
        report["broken"] = str(error)
    return report


def _bit(bit: int) -> Report:
    return {"bit": int(bit), "name": bit.name if isinstance(bit, IntEnum) else None}


def _count(transport: "Transport") -> int:
    """Queues of a device whose transport does not tell: up to the first that is not there."""
    count = 0
    while count < 1 << 16 and transport.queue_max(count):
        count += 1
    return count

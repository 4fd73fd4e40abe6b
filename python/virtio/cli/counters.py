"""What is counted while devices are served: plain values, for JSON and for a table."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from virtio import DeviceQueue
from virtio.cli.switch import Patch
from virtio.device import Device, DeviceState
from virtio.devices.net import NetDevice
from virtio.netdev import Netdev

Values = dict[str, int]


class Counted(Protocol):
    """Something with counters that only grow."""

    def look(self) -> None:
        """Has a look, so that nothing is missed that is gone at the next count."""

    def count(self) -> Values:
        """All of them, by name."""

    @property
    def live(self) -> bool:
        """Whether a driver has it at work."""


def add(one: Values, other: Values) -> Values:
    """Both together."""
    return {name: one.get(name, 0) + other.get(name, 0) for name in (*one, *(name for name in other if name not in one))}


class Ports:
    """A network device's frames: `received` from the machine, `sent` to it."""

    NAMES = ("received_frames", "received_bytes", "sent_frames", "sent_bytes", "dropped_frames")

    def __init__(self, device: NetDevice) -> None:
        self._device = device

    def look(self) -> None:
        """The device keeps its counts itself."""

    @property
    def live(self) -> bool:
        """Its driver has set it up."""
        return self._device.state is DeviceState.DRIVER_OK

    def count(self) -> Values:
        """What the device counted."""
        found = self._device.statistics
        lost = self._device.dropped if isinstance(self._device, Patch) else 0
        return {
            "received_frames": found.get("received_frames", 0),
            "received_bytes": found.get("received_bytes", 0),
            "sent_frames": found.get("sent_frames", 0),
            "sent_bytes": found.get("sent_bytes", 0),
            "dropped_frames": sum(found.get("received_drops", {}).values()) + sum(found.get("sent_drops", {}).values()) + lost,
        }


class Interfaces(Ports):
    """The same of a network device whose frames an interface's pumps move."""

    def __init__(self, device: NetDevice, interface: Netdev) -> None:
        super().__init__(device)
        self._interface = interface

    def count(self) -> Values:
        """What the pumps counted: the interface transmits what the machine sent."""
        found = self._interface.statistics
        values: Values = {}
        dropped = 0
        for name, pump in (("received", found.get("transmit", {})), ("sent", found.get("receive", {}))):
            values |= {f"{name}_frames": pump.get("frames", 0), f"{name}_bytes": pump.get("bytes", 0)}
            dropped += sum(pump.get("drops", {}).values()) + pump.get("refused", 0)
        return {**values, "dropped_frames": dropped}


class Queues:
    """Any device's buffers, by the queues' names. Queues come and go; what they did is kept."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._queues: dict[int, DeviceQueue] = {}
        self._totals: Values = dict.fromkeys(device.queues, 0)

    @property
    def live(self) -> bool:
        """Its driver has set it up."""
        return self._device.state is DeviceState.DRIVER_OK

    def look(self) -> None:
        """Keeps hold of the queues that are there now."""
        for index, name in enumerate(self._device.queues):
            queue, old = self._device.queue(index), self._queues.get(index)
            if queue is not None and queue is not old:
                if old is not None:
                    self._totals[name] += old.counters["used"]
                self._queues[index] = queue

    def count(self) -> Values:
        """Buffers that were used, by queue."""
        self.look()
        return add(self._totals, {self._device.queues[index]: queue.counters["used"] for index, queue in self._queues.items()})


class Several:
    """The devices of one socket together, those that are gone included."""

    def __init__(self, counted: Callable[[Any], Counted], names: Iterable[str]) -> None:
        self._counted = counted
        self._devices: list[tuple[Device, Counted]] = []
        self._totals: Values = dict.fromkeys(names, 0)

    def add(self, device: Device) -> None:
        """One more."""
        self._devices.append((device, self._counted(device)))

    @property
    def live(self) -> bool:
        """Any of them."""
        return any(counted.live for _, counted in self._devices)

    def look(self) -> None:
        """Lets go of devices that no front-end has any more."""
        for device, counted in list(self._devices):
            counted.look()
            if not device.connected:
                self._totals = add(self._totals, counted.count())
                self._devices.remove((device, counted))

    def count(self) -> Values:
        """All of them."""
        found = dict(self._totals)
        for _, counted in self._devices:
            found = add(found, counted.count())
        return found

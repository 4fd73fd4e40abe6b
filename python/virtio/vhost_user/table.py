"""What of the driver's memory a front-end has passed: regions come, go, and stand for other memory, while rings run."""

import os
from collections.abc import Callable

from virtio._core import GuestMemory, Memory
from virtio.vhost_user import effects as fx
from virtio.vhost_user import message as wire


class MemoryTable:
    """Keeps `guest`, a device's memory, as the front-end has it."""

    def __init__(self, guest: GuestMemory) -> None:
        self._guest = guest
        self._memories: dict[int, Memory] = {}
        self._files: dict[int, tuple[int, ...]] = {}
        self._lingering: list[Memory] = []

    def change(self, effect: fx.MapMemory | fx.AddRegion | fx.RemoveRegion, moving: Callable[[], object]) -> None:
        """Carries out what is asked for. `moving` is called before there is other memory at an address (device-23)."""
        guest = self._guest
        match effect:
            case fx.RemoveRegion(region):
                guest.remove(region.guest)
                self._drop(self._memories.pop(region.guest))
                del self._files[region.guest]
            case fx.AddRegion(region, descriptor):
                added = Memory.from_fd(descriptor, region.size, offset=region.offset)
                guest.add(region.guest, added)
                self._memories[region.guest] = added
                self._files[region.guest] = _file(descriptor, region)
            case fx.MapMemory(regions, descriptors):
                made: dict[int, Memory] = {}
                files = {region.guest: _file(descriptor, region) for region, descriptor in zip(regions, descriptors, strict=True)}
                if any(files.get(address) != file for address, file in self._files.items()):
                    moving()
                try:
                    for region, descriptor in zip(regions, descriptors, strict=True):
                        made[region.guest] = Memory.from_fd(descriptor, region.size, offset=region.offset)
                    guest.replace([(address, memory, 0, memory.size) for address, memory in made.items()])
                except BaseException:
                    for memory in made.values():
                        memory.close()
                    raise
                old, self._memories, self._files = self._memories, made, files
                for memory in old.values():
                    self._drop(memory)

    def close(self) -> None:
        """Takes all of it from the device."""
        self._guest.replace([])
        for memory in self._memories.values():
            self._drop(memory)

    def _drop(self, memory: Memory) -> None:
        self._lingering.append(memory)
        left, self._lingering = self._lingering, []
        for each in left:
            try:
                each.close()
            except BufferError:  # a chain that is in flight; it closes with the next
                self._lingering.append(each)


def _file(descriptor: int, region: wire.Region) -> tuple[int, ...]:
    """What a region is: the same descriptor never comes twice, the same file does."""
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, region.offset, region.size

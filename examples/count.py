"""A frame counter with asyncio."""

import asyncio

from virtio import NetDevice, NetDriver
from virtio.transport.loopback import LoopbackTransport


async def count(net: NetDriver, until: int) -> tuple[int, int]:
    frames = size = 0
    async for burst in net:
        frames += burst.count
        size += int(burst.lengths[: burst.count].sum())
        if frames >= until:
            break
    return frames, size


async def feed(device: NetDevice, rounds: int) -> None:
    for number in range(rounds):
        device.send_frames([bytes(60 + number)] * 8)
        await asyncio.sleep(0.001)


async def main() -> None:
    device = NetDevice()
    with LoopbackTransport(device) as transport, NetDriver(transport) as net:
        (frames, size), _ = await asyncio.gather(count(net, 80), feed(device, 10))
        print(f"{frames} frames, {size} bytes")


if __name__ == "__main__":
    asyncio.run(main())

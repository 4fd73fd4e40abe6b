"""Frames as bytes: what `send_frames` and `receive_frames` cost, each end alone, in one process over loopback."""

import time

from virtio.devices.net import WANTED, NetDevice, NetDriver
from virtio.spec import Feature
from virtio.transport.loopback import LoopbackTransport

CALLS = ("driver sends", "device receives", "device sends", "driver receives")


def measure(ring_format: str, burst: int = 64, length: int = 60, rounds: int = 2000) -> dict[str, float]:
    """Nanoseconds a frame of each of `CALLS`, the median of `rounds`. RuntimeError: frames were lost or changed."""
    wanted = WANTED if ring_format == "packed" else WANTED - {Feature.RING_PACKED}
    device = NetDevice()
    samples: dict[str, list[float]] = {name: [] for name in CALLS}
    frames = [bytes([k & 0xFF]) * length for k in range(burst)]
    with LoopbackTransport(device) as transport, NetDriver(transport, wanted=wanted) as net:
        for _ in range(rounds):
            stamps = [time.perf_counter_ns()]
            sent = net.send_frames(frames)
            stamps.append(time.perf_counter_ns())
            there = device.receive_frames(burst)
            stamps.append(time.perf_counter_ns())
            returned = device.send_frames(frames)
            stamps.append(time.perf_counter_ns())
            back = net.receive_frames(burst)
            stamps.append(time.perf_counter_ns())
            if (sent, returned) != (burst, burst) or there != frames or back != frames:
                raise RuntimeError(f"{sent} and {returned} frames sent, {len(there)} and {len(back)} received of {burst}")
            for name, start, end in zip(CALLS, stamps, stamps[1:], strict=False):
                samples[name].append((end - start) / burst)
    return {name: sorted(found)[len(found) // 2] for name, found in samples.items()}

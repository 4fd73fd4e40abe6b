"""Random bytes through a split and a packed ring, driver and device in one process."""

from virtio import Feature
from virtio.devices.rng import RngDevice, RngDriver
from virtio.transport.loopback import LoopbackTransport


def main() -> None:
    for name, wanted in {"split": set(), "packed": {Feature.RING_PACKED}}.items():
        with LoopbackTransport(RngDevice()) as transport, RngDriver(transport, wanted=wanted) as rng:
            data = rng.read(16)
            print(f"{name:6}  {data.hex()}  ({rng.requestq.ring_format} ring of {rng.requestq.size}, {rng.features})")


if __name__ == "__main__":
    main()

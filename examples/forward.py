"""A burst forwarder between two ports that share a pool: no copy and no object for a frame."""

from virtio import NetDevice, NetDriver
from virtio.transport.loopback import LoopbackTransport


def main() -> None:
    left, right = NetDevice(), NetDevice()
    with (
        LoopbackTransport(left) as one,
        LoopbackTransport(right) as other,
        NetDriver(one) as a,
        NetDriver(other, pool=a.pool) as b,
    ):
        burst, arrived = a.pool.burst(64), 0
        for _ in range(100):
            left.send_frames([bytes(60)] * 64)
            a.receive(burst)  # these two lines are the forwarder
            b.send(burst)
            arrived += len(right.receive_frames())
        print(f"{arrived} frames forwarded, {b.statistics['sent_bytes']} bytes, drops: {b.statistics['sent_drops'] or 'none'}")


if __name__ == "__main__":
    main()

"""Frames as bytes: a network device and its driver in one process."""

from virtio import NetDevice, NetDriver
from virtio.transport.loopback import LoopbackTransport


def main() -> None:
    device = NetDevice(mac=bytes.fromhex("525400123456"), mtu=1500)
    with LoopbackTransport(device) as transport, NetDriver(transport) as net:
        print(f"Ethernet address {net.mac.hex(':')}, MTU {net.mtu}, header of {net.header_size} bytes")
        broadcast = b"\xff" * 6 + net.mac + b"\x88\xb5" + b"hello".ljust(46, b"\0")
        print(net.send_frames([broadcast] * 3), "frames sent")
        frames = device.receive_frames()
        print(len(frames), "arrived,", device.send_frames(frames), "sent back,", len(net.receive_frames()), "received")


if __name__ == "__main__":
    main()

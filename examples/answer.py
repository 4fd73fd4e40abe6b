"""A network device that answers ARP and ping, in a subclass."""

import struct

from virtio import Burst, NetDevice, NetDriver
from virtio.transport.loopback import LoopbackTransport

ADDRESS = bytes([192, 168, 90, 2])


class Answer(NetDevice):
    def on_frames(self, burst: Burst) -> None:
        frames = self.pool.frames
        for row in range(burst.count):
            frame = frames[burst.slots[row]]
            kind = bytes(frame[12:14])
            if kind == b"\x08\x06" and bytes(frame[38:42]) == ADDRESS and frame[21] == 1:  # who has our address?
                frame[32:42] = frame[22:32]
                frame[22:32] = list(self.mac + ADDRESS)
                frame[21] = 2
            elif kind == b"\x08\x00" and bytes(frame[30:34]) == ADDRESS and frame[23] == 1 and frame[34] == 8:  # echo request
                frame[26:30], frame[30:34] = frame[30:34].copy(), frame[26:30].copy()
                frame[34] = 0
                total = int.from_bytes(bytes(frame[36:38]), "big") + 0x800  # the checksum follows
                frame[36:38] = list((total % 0xFFFF).to_bytes(2, "big"))
            frame[:6], frame[6:12] = frame[6:12].copy(), list(self.mac)
        self.send(burst)


with LoopbackTransport(Answer()) as transport, NetDriver(transport) as net:
    mine = bytes([192, 168, 90, 1])
    arp = b"\xff" * 6 + net.mac + struct.pack(">HHHBBH", 0x806, 1, 0x800, 6, 4, 1) + net.mac + mine + bytes(6) + ADDRESS
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 32, 1, 0, 64, 1, 0) + mine + ADDRESS
    net.send_frames([arp, net.mac * 2 + b"\x08\x00" + ip + struct.pack(">BBHHH4s", 8, 0, 0x2345, 7, 1, b"ping")])
    net.wait(1.0)
    reply, echo = net.receive_frames()
    print(f"{ADDRESS[3]} is at {reply[22:28].hex(':')}; echo type {echo[34]}, checksum {echo[36:38].hex()}, {echo[42:].decode()}")

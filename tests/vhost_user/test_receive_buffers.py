"""A receive buffer of which not all is mapped, whichever call would fill it (device-11)."""

import pytest

from tests.vhost_user.frontend import GUEST, Frontend
from virtio import Feature, NetDevice
from virtio.errors import MalformedChain
from virtio.features import Features
from virtio.vhost_user.backend import Backend


@pytest.mark.parametrize("burst", [False, True])
def test_device_11_all_of_a_receive_buffer_has_to_be_mapped(path: str, ring_features: Features, burst: bool) -> None:
    device = NetDevice()
    with Backend(path, device) as backend, Frontend.at(path, backend) as frontend:
        frontend.negotiate(ring_features | {Feature.VERSION_1})
        queues = [frontend.queue(index) for index in range(2)]
        for queue in queues:
            frontend.start(queue)
        for number in range(2):
            queues[0].add(number, writable=[frontend.room(1600)])
        queues[0].publish()
        frontend.turn()
        frontend.memory.store(queues[0].areas[0] - GUEST + 8, 4, 0xFFFFFFF0)
        with pytest.raises(MalformedChain, match="4294967280 bytes"):
            if burst:
                frames = device.pool.burst(1)
                device.take(frames)
                frames.write(bytes(60))
                device.send(frames)
            else:
                device.send_frames([bytes(60)])

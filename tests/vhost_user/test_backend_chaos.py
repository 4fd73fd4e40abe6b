"""Front-ends that send anything, in any order, with any descriptors: the back-end goes on, and keeps nothing of theirs."""

import os
import socket
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.leftovers import descriptors
from tests.vhost_user.frontend import GUEST, SIZE, USER, Frontend
from virtio import Burst, EventFd, Feature, Memory, NetDevice, NetFeature
from virtio.features import Features
from virtio.vhost_user import message as wire
from virtio.vhost_user.backend import Backend

PAIRS: list[set[int]] = [set(), {NetFeature.MQ}, {NetFeature.MQ, NetFeature.CTRL_VQ}]
FEATURES = 1 << 32 | 1 << 30
edges = st.sampled_from(
    [0, 1, 2, 15, 16, 255, 256, 257, 4096, GUEST, USER, USER + 0x1000, USER + 0x2000, SIZE, (1 << 32) - 1, (1 << 64) - 1]
)
small = st.sampled_from([0, 1, 1, 2, 3, 4, 5, 16, 255])
fields: dict[type[wire.Payload], st.SearchStrategy[Any]] = {
    wire.VringState: st.builds(wire.VringState, small, small),
    wire.VringAddr: st.builds(
        wire.VringAddr, small, small, *[st.sampled_from([USER, USER + 0x1000, USER + 0x2000, 3])] * 3, st.just(GUEST)
    ),
    wire.U64: st.builds(wire.U64, st.one_of(edges, st.sampled_from([FEATURES, FEATURES | 1 << 34, FEATURES | 1 << 26]))),
    wire.Log: st.builds(wire.Log, edges, small),
    wire.Regions: st.lists(
        st.builds(wire.Region, st.sampled_from([GUEST, GUEST + SIZE]), st.just(SIZE), st.sampled_from([USER, USER + SIZE]), small),
        max_size=3,
    ).map(wire.Regions),
    wire.SingleRegion: st.builds(wire.SingleRegion, st.just(GUEST + SIZE), st.just(SIZE), st.just(USER + SIZE), small),
    wire.Config: st.builds(lambda offset, size: wire.Config(offset, size, 0, bytes(size)), small, small),
}


def body(rule: wire.Rule) -> st.SearchStrategy[bytes]:
    known = fields.get(rule.payload)
    return st.binary(max_size=40) if known is None else st.one_of(known.map(lambda payload: payload.pack()), st.binary(max_size=40))


message = st.sampled_from(sorted(wire.FRONTEND_RULES)).flatmap(
    lambda request: st.tuples(
        st.just(request),
        body(wire.FRONTEND_RULES[request]),
        st.booleans(),
        st.lists(st.sampled_from(["memory", "event", "socket", "pipe", "nothing"]), max_size=3),
    )
)


class Echo(NetDevice):
    def on_frames(self, burst: Burst) -> None:
        self.send(burst)


@settings(max_examples=150)
@given(st.lists(message, max_size=30), st.integers(0, 40), st.booleans(), st.sampled_from(PAIRS))
def test_device_23_any_messages(messages: list[tuple[int, bytes, bool, list[str]]], cut: int, negotiated: bool, more: set[int]) -> None:
    """On one queue pair, and on two with a control queue of ours or of the front-end's."""
    device = Echo(slots=16, queue_pairs=2 if more else 1)
    errors: list[Exception] = []
    memory, event, (end, other), (reader, writer) = Memory(SIZE), EventFd(), socket.socketpair(), os.pipe()
    nothing = os.open("/dev/null", os.O_RDWR)
    kinds = {"memory": memory.fileno(), "event": event.fileno(), "socket": end.fileno(), "pipe": writer, "nothing": nothing}
    ours, theirs = socket.socketpair()
    assert device.pool.slots
    before = descriptors()
    with Backend(theirs.detach(), device, report=errors.append) as backend:
        frontend = Frontend(ours, backend)
        if negotiated:
            frontend.negotiate(Features({Feature.VERSION_1, *more}))
            for index in range(4 + (NetFeature.CTRL_VQ in more) if more else 2):
                frontend.start(frontend.queue(index))
        try:
            for place, (request, payload, ack, passed) in enumerate(messages):
                data = wire.HEADER.pack(request, 1 | ack * wire.NEED_REPLY, len(payload)) + payload
                rest = len(data) if place + 1 < len(messages) else max(1, len(data) - cut)
                frontend.raw(data[:rest], [kinds[each] for each in passed])
                event.signal()
                frontend.turn()
        except OSError:  # it has hung up
            pass
        frontend.close()
        while backend.connections:
            backend.process(1.0)
    assert not [error for error in errors if isinstance(error, TypeError | AttributeError | KeyError | AssertionError | IndexError)], errors
    assert descriptors() <= before
    for descriptor in (reader, writer, nothing):
        os.close(descriptor)
    for each in (end, other, event, memory):
        each.close()

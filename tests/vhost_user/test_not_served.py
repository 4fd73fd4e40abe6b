"""What a back-end does not serve: devices that were never made whole, and sockets that are none of its."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from virtio import Device, DeviceId, DeviceQueue
from virtio.devices.rng import RngDevice
from virtio.errors import TransportError
from virtio.transport.vhost_user import VhostUserTransport
from virtio.vhost_user.backend import Backend


class Forgetful(Device):
    device_id = DeviceId.ENTROPY
    queues = ("requestq",)

    def __init__(self) -> None:
        """Without its base class's."""

    def on_requestq(self, queue: DeviceQueue) -> None:
        raise NotImplementedError


def test_a_device_whose_constructor_forgot_its_base_class(path: str) -> None:
    with pytest.raises(TypeError, match=r"^Forgetful\.__init__ does not call super\(\).__init__\(\)$"):
        Backend(path, Forgetful())
    assert not os.path.exists(path)


@pytest.mark.parametrize(
    ("make", "said"),
    [(Forgetful, "Forgetful.__init__ does not call super().__init__()"), (lambda: "dice", "device is 'dice': it has to be a Device")],
)
def test_what_a_factory_makes_is_told_and_ends_its_connection(path: str, make: Callable[[], Device], said: str) -> None:
    errors: list[Exception] = []
    with Backend(path, make, report=errors.append) as backend, socket.socket(socket.AF_UNIX) as connected:
        connected.settimeout(60)
        connected.connect(path)
        backend.process(60.0)
        assert connected.recv(1) == b""
        assert (backend.connections, backend.accepted) == (0, 0)
    [error] = errors
    assert isinstance(error, TypeError) and said in str(error)


@pytest.mark.parametrize("bound", [False, True])
def test_a_socket_that_neither_listens_nor_is_connected(path: str, bound: bool) -> None:
    with socket.socket(socket.AF_UNIX) as idle:
        if bound:
            idle.bind(path)
        said = rf"^descriptor {idle.fileno()} is a Unix socket that neither listens nor is connected$"
        with pytest.raises(TransportError, match=said):
            Backend(idle.fileno(), RngDevice())
        with pytest.raises(TransportError, match=said):
            VhostUserTransport(idle.fileno(), DeviceId.ENTROPY)
        os.fstat(idle.fileno())  # it is the caller's still


def test_a_connection_whose_other_end_has_gone_is_one(path: str) -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    with Backend(theirs.detach(), RngDevice()) as backend:
        backend.serve()
        assert backend.ended


def test_who_cannot_be_connected_to_is_told_of_once(path: str) -> None:
    errors: list[Exception] = []
    with Backend(path, RngDevice(), True, report=errors.append) as backend:
        turns: list[tuple[Callable[[], object], list[str]]] = [
            (lambda: None, []),  # nobody is there yet
            (lambda: Path(path).write_text(""), [f"cannot connect to {path}: it is not a socket"]),
            (lambda: os.unlink(path), []),
            (lambda: Path(path).mkdir(), [f"cannot connect to {path}: it is not a socket"]),
        ]
        for change, said in turns:
            change()
            for _ in range(3):
                backend._retry_at = 0.0
                backend.process(0.0)
            assert [str(error) for error in errors] == said
            errors.clear()

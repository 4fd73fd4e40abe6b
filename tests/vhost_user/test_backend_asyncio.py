"""A back-end in an asyncio loop, to which nobody else gives turns."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.leftovers import all_closed
from virtio.devices.rng import RngDevice, RngDriver
from virtio.errors import StatusError
from virtio.spec import DeviceId
from virtio.transport.vhost_user import VhostUserTransport
from virtio.vhost_user.backend import Backend

PATIENCE = 60.0


@asynccontextmanager
async def running(backend: Backend) -> AsyncIterator[asyncio.Task[None]]:
    """Its task, which ends by `stop`."""
    task = asyncio.create_task(backend.run())
    yield task
    backend.stop()
    await asyncio.wait_for(task, PATIENCE)


def ask(path: str, count: int, *, listen: bool = False) -> bytes:
    """What a driver reads."""
    with (
        VhostUserTransport(path, DeviceId.ENTROPY, listen=listen, timeout=PATIENCE, connect_timeout=PATIENCE) as transport,
        RngDriver(transport) as driver,
    ):
        return driver.read(count, timeout=PATIENCE)


@pytest.mark.parametrize("poll", [False, True], ids=["kicked", "polled"])
@pytest.mark.parametrize("connect", [False, True], ids=["listens", "connects"])
def test_a_loop_runs_it(tmp_path: Path, *, connect: bool, poll: bool) -> None:
    path = str(tmp_path / "s")

    async def main() -> None:
        with Backend(path, lambda: RngDevice(bytes), connect, poll=poll) as backend:
            async with running(backend) as task:
                for number in range(2):
                    found = await asyncio.to_thread(ask, path, 16 + number, listen=connect)
                    assert found == bytes(16 + number) and not task.done()

    with all_closed():
        asyncio.run(main())


def test_it_ends_with_the_only_connection_that_there_can_be() -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        with ours, Backend(theirs.detach(), RngDevice()) as backend:
            task = asyncio.create_task(backend.run())
            await asyncio.sleep(0)
            ours.close()
            await asyncio.wait_for(task, PATIENCE)

    with all_closed():
        asyncio.run(main())


def test_it_may_be_cancelled_and_run_again_and_says_when_it_is_closed(tmp_path: Path) -> None:
    path = str(tmp_path / "s")

    async def main() -> None:
        backend = Backend(path, RngDevice(bytes))
        task = asyncio.create_task(backend.run())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        task = asyncio.create_task(backend.run())
        assert await asyncio.to_thread(ask, path, 16) == bytes(16)
        backend.close()
        with pytest.raises(StatusError, match="the back-end is closed"):
            await asyncio.wait_for(task, PATIENCE)

    with all_closed():
        asyncio.run(main())

"""One connection of a back-end: carries out on a `Device` what the session asks for. Sockets and loop are in `virtio.vhost_user.backend`.

Its rings are in `virtio.vhost_user.rings`. What the front-end passes is duplicated by its user and closed behind each message, so nothing
stays open on any way out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from time import monotonic
from typing import Final

from virtio._core import EventFd
from virtio.device import Device, DeviceState
from virtio.errors import SpecViolation, StatusError, TransportError, VirtioError
from virtio.features import Features
from virtio.spec import DeviceId, Status
from virtio.vhost_user import effects as fx
from virtio.vhost_user.backend_session import Answer, BackendSession, Send, descriptors_of
from virtio.vhost_user.channel import Channel
from virtio.vhost_user.dirty import DirtyLog
from virtio.vhost_user.message import ProtocolFeature
from virtio.vhost_user.rings import CTRL_VQ, Rings
from virtio.vhost_user.serving import Loop
from virtio.vhost_user.socket import Link
from virtio.vhost_user.state import StateTransfer
from virtio.vhost_user.table import MemoryTable
from virtio.vhost_user.tracking import InflightArea

PROTOCOL: Final = Features(
    {
        *(ProtocolFeature.MQ, ProtocolFeature.LOG_SHMFD, ProtocolFeature.REPLY_ACK, ProtocolFeature.MTU, ProtocolFeature.BACKEND_REQ),
        *(ProtocolFeature.CONFIG, ProtocolFeature.RESET_DEVICE, ProtocolFeature.CONFIGURE_MEM_SLOTS, ProtocolFeature.STATUS),
        *(ProtocolFeature.INFLIGHT_SHMFD, ProtocolFeature.RARP, ProtocolFeature.DEVICE_STATE),
    }
)
"""Protocol features that are offered."""
SPIN: Final = 0.0002
"""Seconds that one turn of a connection looks at its rings before it looks at its messages, if it never sleeps."""
MESSAGES: Final = 64
"""Messages that one turn reads at most, so that others have theirs."""
LONG: Final = 0.02
"""Seconds after which a turn reads no further message."""


class Connection:
    """A front-end that is connected over `link`, and the device that it has. Both are its own until `close`."""

    def __init__(
        self,
        link: Link,
        device: Device,
        loop: Loop,
        *,
        protocol_features: Features = PROTOCOL,
        poll: bool = False,
        withheld: Iterable[int] = (),
    ) -> None:
        """StatusError: the device is on a transport already. OSError: `loop` cannot watch. The link is closed."""
        self.device: Final = device
        self.session: Final = BackendSession(
            device.offered - withheld,
            len(device.queues),
            file_size=lambda descriptor: os.fstat(descriptor).st_size,
            protocol_features=protocol_features - ([ProtocolFeature.RARP] if getattr(device, "on_rarp", None) is None else []),
            max_queue_size=device.queue_size,
            rules=device.rules,
            assumed={CTRL_VQ} if device.device_id == DeviceId.NETWORK else (),
            queue_count=len(device.queues) // 2 if device.device_id == DeviceId.NETWORK else None,
        )
        self.rings: Final = Rings(device, loop, poll=poll, serve=self.poll, heard=self._heard)
        self.closed = False
        self._link, self._loop, self._poll = link, loop, poll
        self._config_changed, self._serving_changed = EventFd(), EventFd()
        try:
            device.connect(self._config_changed, serving_changed=self._serving_changed)
        except StatusError:
            self._config_changed.close()
            self._serving_changed.close()
            link.close()
            raise
        self._status = 0
        self._unread = self._blocked = False
        self._memory = MemoryTable(device.memory)
        self._channel = Channel(loop)
        self._log = DirtyLog(device.memory)
        self._state = StateTransfer()
        try:
            loop.watch(link.fileno(), self.receive)
            loop.watch(self._config_changed.fileno(), self._tell_config)
            loop.watch(self._serving_changed.fileno(), self._look_again)
        except BaseException:  # the kernel watches no more for this user
            self.close()
            raise

    @property
    def busy(self) -> bool:
        """Whether it wants `spin` without being kicked."""
        return self.rings.busy

    @property
    def logging(self) -> bool:
        """Whether `flush_log` is to be called now and then."""
        return self._log.wanted

    @property
    def descriptor(self) -> int:
        """The descriptor of the connection."""
        return self._link.fileno()

    # What arrives.

    def receive(self) -> None:
        """Reads and carries out the messages that are there, up to `MESSAGES`, or as many as are begun within `LONG` seconds.

        None is read while the front-end leaves a reply unread: its rings are served, and what it asks besides waits in the kernel.
        """
        self._unread = True
        until = monotonic() + LONG
        for number in range(MESSAGES):
            if number and monotonic() > until:
                return
            if self.closed or not self._answered() or (received := self._link.receive(self.session.needed)) is None:
                self._unread = False
                return
            data, descriptors = received
            if not data:
                self.close()
                return
            for step in self.session.feed(data, descriptors):
                try:
                    self._carry_out(step.effects, step.done, step.failed)
                except Exception as error:  # also what a device raises: other connections go on
                    self._loop.report(error)
                    self.close()

    def _answered(self) -> bool:
        """Whether the front-end has taken every reply; if not, the loop looks for room, and calls `receive` again then."""
        try:
            self._link.flush()
        except TransportError:
            self.close()
            return False
        if self._link.waiting is not self._blocked:
            self._blocked = self._link.waiting
            self._loop.await_room(self._link.fileno(), wanted=self._blocked)
        return not self._blocked

    def _carry_out(self, effects: tuple[fx.Effect, ...], done: Callable[[Answer], Send], failed: Callable[[], Send | None]) -> None:
        ended = False
        try:
            for effect in effects:  # what moves is taken off while its memory is still there
                if isinstance(effect, fx.SetVringAddr | fx.BreakVring) and not self.closed:
                    self.rings.take_off(effect.index)
            answer: Answer = None
            sent: Send | None
            try:
                for effect in effects:
                    if isinstance(effect, fx.Disconnect):
                        ended = True
                        self._loop.report(effect.error)
                    elif not self.closed:
                        found = self._do(effect)
                        answer = answer if found is None else found
                sent = done(answer) if not ended else Send()
            except (VirtioError, ValueError, OSError) as error:
                self._loop.report(error)
                sent = failed()
            if not self.closed:
                for index in range(len(self.rings.each)):
                    self.rings.place(index)
            if sent is None:
                ended = True
            elif not self.closed and not ended:
                self.flush_log()
                self._link.send(sent)
                self._answered()
        finally:
            for effect in effects:
                for descriptor in descriptors_of(effect):
                    os.close(descriptor)
        if ended:
            self.close()

    # What is asked for.

    def _do(self, effect: fx.Effect) -> Answer:
        match effect:
            case fx.Refused(error):
                self._loop.report(error)
            case fx.SetFeatures(features, log):
                self._set_features(features, log)
            case fx.MapMemory() | fx.AddRegion() | fx.RemoveRegion():
                self._memory.change(effect, self._take_off)
                if self._log.wanted:
                    self.flush_log()
                    self._log.start()  # it may have to reach further
            case fx.SetVringKick(index):
                self.rings.change(effect)
                self.session.kicked(index)
            case (
                (fx.SetVringNum() | fx.SetVringAddr() | fx.SetVringBase() | fx.SetVringEnable() | fx.StopVring() | fx.BreakVring())
                | fx.SetVringCall()
                | fx.SetVringErr()
            ):
                return self.rings.change(effect)
            case fx.GetConfig(offset, size):
                have = self.device.read_config(offset, min(size, max(0, len(self.device.config) - offset)))
                return have.ljust(size, b"\0")  # the front-end's structure may be longer
            case fx.SetConfig(config):
                self.device.write_config(config.offset, config.data)
            case fx.SetLogBase(log, descriptor):
                self.flush_log()
                self._log.place(log, descriptor)
            case fx.GetInflight(wanted):
                return self.rings.track(InflightArea.make(wanted, packed=self.rings.packed)).answer
            case fx.SetInflight(area, descriptor):
                self.rings.track(InflightArea.passed(area, descriptor))
            case fx.SetBackendChannel(descriptor):
                self._channel.place(descriptor)
            case fx.ResetDevice():
                self._begin_anew()
            case fx.SetStatus(status):
                self._status = status
                if not status:
                    self._begin_anew()
            case fx.GetStatus():
                return self._status | (Status.NEEDS_RESET if self.device.state is DeviceState.NEEDS_RESET else 0)
            case fx.SendRarp(value) | fx.SetMtu(value):
                hook = getattr(self.device, "on_rarp" if isinstance(effect, fx.SendRarp) else "on_mtu", None)
                if hook is not None:
                    hook(value)
            case fx.TransferDeviceState(transfer, descriptor):
                self._state.begin(transfer.direction, descriptor)
            case fx.CheckDeviceState():
                return self._state.check()
            case fx.SetOwner() | fx.SetProtocolFeatures() | fx.SetLogFd() | fx.CloseDescriptors():
                pass  # nothing to do
            case _:  # which the session would have to refuse
                raise NotImplementedError(f"a back-end has no answer to {type(effect).__name__}")
        return None

    def _set_features(self, features: Features, log: bool) -> None:
        if features != self.rings.features:
            self.rings.forget_broken()
            self._reset()
            self.rings.forget_inflight()
            self.rings.features = features
        self._log.wanted = log
        self._log.start()

    def _begin_anew(self) -> None:
        """The front-end asks for a device reset (2.4): no ring runs until it is given a kick again."""
        self.rings.stop()
        self._reset()
        self.rings.forget_inflight()

    def _take_off(self) -> None:
        for index in range(len(self.rings.each)):
            self.rings.take_off(index)

    def _reset(self) -> None:
        self._take_off()
        self.device.reset()

    # Serving.

    def _heard(self) -> bool:
        """Whether rings are to be served: not before what has come is carried out, since that may stop one, or be the end."""
        if self._unread:
            self.receive()
        return not self.closed and not self._unread

    def poll(self) -> int:
        """Serves the device's queues; how many handler calls that took. Whatever a handler raises ends the connection."""
        return self._serve(self.device.poll)

    def spin(self, seconds: float) -> int:
        """As `poll`, for one that never sleeps: over and over for so many seconds, `SPIN` at most, and once at least."""
        if not self._poll:
            return self.poll()
        until = monotonic() + min(seconds, SPIN)

        def serve() -> int:
            spin, calls = self.device.spin, 0
            while True:
                calls += spin()
                if self.closed or monotonic() >= until:
                    return calls

        return self._serve(serve)

    def _serve(self, serve: Callable[[], int]) -> int:
        if not self._heard():
            return 0
        try:
            calls = serve()
        except SpecViolation as error:
            self._loop.report(error)
            calls = 1
        except Exception as error:
            self._loop.report(error)
            self.close()
            return 0
        if self.device.state is DeviceState.NEEDS_RESET:  # kicks are for nobody until the front-end begins anew
            self.rings.needs_reset()
        return calls

    def _look_again(self) -> None:
        self._serving_changed.drain()
        self.rings.look_again()

    def _tell_config(self) -> None:
        self._config_changed.drain()
        self._channel.tell_config(self.session.protocol)

    def flush_log(self) -> None:
        """Carries the marks of what was written over to the front-end's log."""
        self._log.flush(self.rings.used_areas)

    def close(self) -> None:
        """Resets the device and takes all from it; closes all that is the connection's. Whatever a step raises, the others are taken.

        Again does nothing.
        """
        if self.closed:
            return
        self.closed = True
        with ExitStack() as left:  # what is named last is the first
            for each in (self._link, self._channel, self._serving_changed, self._config_changed, self.rings):
                left.callback(self._last, each.close)
            for owned in (self._memory, self._state, self._log):
                left.callback(self._last, owned.close)
            left.callback(self._last, lambda: self.device.connect(None))
            for step in (self.device.reset, self._take_off, self._flush_last, self._forget, self._unwatch):
                left.callback(self._last, step)

    def _last(self, step: Callable[[], object]) -> None:
        """One step of `close`."""
        try:
            step()
        except Exception as error:
            self._loop.report(error)

    def _unwatch(self) -> None:
        for each in (self._link, self._config_changed, self._serving_changed):
            self._loop.unwatch(each.fileno())

    def _forget(self) -> None:
        for effect in self.session.end():
            for descriptor in descriptors_of(effect):
                os.close(descriptor)

    def _flush_last(self) -> None:
        with suppress(VirtioError):  # a log that is gone
            self.flush_log()

"""Two processes, Python at both ends, one pinned core each, polling: nanoseconds for a buffer to go round a ring."""

import os
import signal
import time
import zlib
from dataclasses import dataclass

from virtio.bench.setup import Far, Near, pin

SAMPLE = 1000
"""One frame in so many is checked byte for byte."""


@dataclass(frozen=True)
class Pair:
    """What a run is. `payload` bytes are written by the driver and copied into a slot by the device; 0 moves descriptors only."""

    ring_format: str = "split"
    size: int = 256
    burst: int = 64
    payload: int = 0
    total: int = 1 << 20

    def measure(self) -> float:
        """Nanoseconds a buffer. RuntimeError: the device's process lost buffers or found other bytes than were sent."""
        near = Near(self.ring_format, self.size, self.burst)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(reader)
                code = self._serve(near, writer)
            finally:
                os._exit(code)
        os.close(writer)
        try:
            if os.read(reader, 1) != b"r":
                raise RuntimeError("the device's process did not start")
            nanoseconds = self._drive(near)
        except BaseException:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
        finally:
            os.close(reader)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != 0:
            raise RuntimeError(f"the device's process lost buffers or found other bytes than were sent (exit code {code})")
        return nanoseconds

    def _drive(self, near: Near) -> float:
        pin(0)
        queue, pool, payload, total = near.queue, near.pool, self.payload, self.total
        burst = pool.burst(self.burst)
        length = max(payload, 1)
        template = bytes(k & 0xFF for k in range(payload))
        start = time.perf_counter_ns()
        added = done = 0
        while queue.free and added < total:
            burst.count = min(pool.take(burst), queue.free, total - added)
            if payload:
                burst.write(template)
            added += queue.add_burst(burst, length)
        while done < total:
            count = queue.pop_used_burst(burst)
            if not count:
                continue
            done += count
            if added < total:
                if count > total - added:
                    burst.count = total - added
                if payload:
                    burst.write(template)
                added += queue.add_burst(burst) if payload else queue.add_burst(burst, length)
        elapsed = time.perf_counter_ns() - start
        if done != total:
            raise RuntimeError(f"{done} buffers came back of {total}")
        return elapsed / total

    def _serve(self, near: Near, ready: int) -> int:
        pin(1)
        far = near.far()
        return self._serve_bytes(far, ready) if self.payload else self._serve_descriptors(far, ready)

    def _serve_descriptors(self, far: Far, ready: int) -> int:
        queue = far.queue
        batch = queue.batch(self.burst)
        readable = batch.readable
        batch.used[:] = 0
        os.write(ready, b"r")
        done = length = sampled = 0
        while done < self.total:
            count = queue.pop_batch(batch)
            if count:
                if done // SAMPLE != (done + count) // SAMPLE:
                    sampled += 1
                    length += int(readable[0])
                queue.complete_batch(batch)
                done += count
        return 0 if done == self.total and length == sampled else 2

    def _serve_bytes(self, far: Far, ready: int) -> int:
        queue = far.queue
        burst = far.pool.burst(self.burst)
        checksum = zlib.crc32(bytes(k & 0xFF for k in range(self.payload)))
        os.write(ready, b"r")
        done = wrong = 0
        while done < self.total:
            count = queue.pop_burst(burst)
            if count and done // SAMPLE != (done + count) // SAMPLE:
                wrong += zlib.crc32(burst.tobytes(0)) != checksum
            done += count
        queue.complete_burst(burst)
        return 0 if done == self.total and not wrong else 2

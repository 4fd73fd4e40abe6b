"""Transfer of a device's own state (DEVICE_STATE), for devices that have none: what is saved is empty, and so must be what is loaded."""

import errno
import os
import select
from typing import Final

SAVE: Final = 0
FAILED: Final = 1


class StateTransfer:
    """One at a time; a new one replaces it."""

    def __init__(self) -> None:
        self._loaded: int | None = None

    def begin(self, direction: int, descriptor: int) -> None:
        """Nothing is written when saving: the caller closes the descriptor, which is its end. When loading it is kept, to be read."""
        self.close()
        if direction != SAVE:
            self._loaded = os.dup(descriptor)
            os.set_blocking(self._loaded, False)

    def check(self) -> int:
        """0 if all went well. Otherwise there was state to load, which is nobody's, or it has not ended."""
        if self._loaded is None:
            return 0
        try:
            failed = _goes_on(self._loaded)
        except OSError:  # that is no end either
            failed = True
        self.close()
        return FAILED if failed else 0

    def close(self) -> None:
        """Lets go of the descriptor."""
        if self._loaded is not None:
            os.close(self._loaded)
            self._loaded = None


def _goes_on(descriptor: int) -> bool:
    """Whether it has not ended. It is not waited for: O_NONBLOCK is the peer's too, who may clear it. OSError: it cannot be read."""
    try:
        return bool(os.preadv(descriptor, [bytearray(1)], -1, os.RWF_NOWAIT))
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):  # a kernel of that age, or a filter of calls
            raise
    readable = select.poll()
    readable.register(descriptor, select.POLLIN)
    return not readable.poll(0) or bool(os.read(descriptor, 1))

"""Transfer of a device's own state (DEVICE_STATE), for devices that have none: what is saved is empty, and so must be what is loaded."""

import os
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
            failed = bool(os.read(self._loaded, 1))
        except OSError:  # among them BlockingIOError: the other end is open
            failed = True
        self.close()
        return FAILED if failed else 0

    def close(self) -> None:
        """Lets go of the descriptor."""
        if self._loaded is not None:
            os.close(self._loaded)
            self._loaded = None

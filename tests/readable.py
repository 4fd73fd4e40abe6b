"""Whether descriptors are readable, however large their numbers are (select.select takes only those below 1024)."""

import select


def readable(*descriptors: int, seconds: float = 0.0) -> bool:
    """Waits up to `seconds` until one of them is."""
    waiting = select.poll()
    for descriptor in descriptors:
        waiting.register(descriptor, select.POLLIN)
    return bool(waiting.poll(seconds * 1000))

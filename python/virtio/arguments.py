"""Checks of arguments, shared by whoever takes them: an error comes from the call that was wrong, and names argument, value and limit.

TypeError: something of another type. ValueError: out of range.
"""

from collections.abc import Iterable
from operator import index
from typing import Any, Final, TypeVar

_T = TypeVar("_T")

MAC_SIZE: Final = 6


def wrong_type(what: str, value: object, wanted: str) -> TypeError:
    """The error for a value of another type, or for a class where an object of it belongs."""
    if isinstance(value, type):
        found = f"the class {value.__name__}, not an object of it" if value.__module__ != "builtins" else f"the type {value.__name__}"
    else:
        found = f"{value!r:.60}" if value is None or isinstance(value, str | bytes | int | float) else f"a {type(value).__name__}"
    return TypeError(f"{what} is {found}: it has to be {wanted}")


def instance(what: str, value: Any, kind: type[_T], wanted: str) -> _T:
    """`value`, if it is of `kind`, which is called `wanted`."""
    if not isinstance(value, kind):
        raise wrong_type(what, value, wanted)
    return value


def having(what: str, value: Any, methods: Iterable[str], wanted: str) -> None:
    """An object that has these methods, as what stands for a protocol."""
    if isinstance(value, type) or not all(hasattr(value, name) for name in methods):
        raise wrong_type(what, value, wanted)


def number(what: str, value: Any) -> int:
    """An integer, of whatever size."""
    try:
        found = index(value)
    except TypeError:
        raise wrong_type(what, value, "an integer") from None
    if isinstance(value, bool):
        raise wrong_type(what, value, "an integer")
    return found


def integer(what: str, value: Any, least: int, most: int, unit: str = "") -> int:
    """An integer from `least` to `most`; `unit`, and a section, go behind these in the message."""
    found = number(what, value)
    if not least <= found <= most:
        raise ValueError(f"{what} {found} is outside {least}..{most}{unit and ' ' + unit}")
    return found


def seconds(what: str, value: Any) -> float:
    """A time; one that has passed, below 0, is 0."""
    if not isinstance(value, int | float):
        try:
            value = value.__float__()  # numpy's numbers
        except AttributeError:
            raise wrong_type(what, value, "seconds, a number") from None
    if value != value:
        raise ValueError(f"{what} {value} is no time")
    return float(min(max(value, 0), 1e18))


def switch(what: str, value: Any) -> bool:
    """True or False, and nothing that only passes for one of these."""
    return instance(what, value, bool, "True or False")


def call(what: str, value: Any) -> None:
    """Something to call."""
    if not callable(value):
        raise wrong_type(what, value, "something to call")


def strings(what: str, values: Any, example: str) -> list[str]:
    """Strings, and no single one, whose letters would be taken for them."""
    wanted = f"strings, as {example}"
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise wrong_type(what, values, wanted)
    found = list(values)
    for place, value in enumerate(found):
        instance(f"{what}[{place}]", value, str, "a string")
    return found


def buffer(what: str, value: Any, wanted: str = "bytes") -> bytes:
    """A copy of something bytes-like."""
    if not isinstance(value, bytes | bytearray | memoryview):
        raise wrong_type(what, value, wanted)
    return bytes(value)


def mac(what: str, value: Any) -> bytes:
    """The Ethernet address of one station: neither a group's nor all zeros."""
    data = buffer(what, value, "6 bytes, as of bytes.fromhex('525400123456')")
    if len(data) != MAC_SIZE or data[0] & 1 or not any(data):
        why = f"{len(data)} bytes, not {MAC_SIZE}" if len(data) != MAC_SIZE else "a group's" if data[0] & 1 else "nobody's"
        raise ValueError(f"{what} {data.hex(':')} is not the address of one station: it is {why}")
    return data

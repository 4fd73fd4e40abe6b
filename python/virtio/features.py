"""Feature bits as sets (2.2): 128 bits, of any enumeration, with the rules between them. Pure values: nothing here talks to a device.

A device type brings an `IntEnum` of its bits and a tuple of `Requires`; `select` is the driver's choice, `check_accepted` the device's
answer to it, and both name in their refusals every bit and the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from enum import IntEnum
from typing import Final, Self, final

from virtio import arguments
from virtio.errors import FeatureNegotiationError
from virtio.spec import FEATURE_BITS, Feature

WORD_BITS: Final = 32
"""Transports move features in words of this width (4.1.4.3, 4.2.2)."""

_WORDS = FEATURE_BITS // WORD_BITS


@final
class Features(AbstractSet[int]):
    """An immutable set of feature bit numbers, 0 to 127.

    Made of members of any `IntEnum`, of plain numbers, or of other `Features`; iterating gives, in ascending order, members where the
    enumeration is known and plain numbers where it is not. `int(features)` is the mask that goes over the wire. Equality is that of the
    bits: names do not count.
    """

    __slots__ = ("_mask", "_names")
    _mask: int
    _names: tuple[type[IntEnum], ...]

    def __init__(self, bits: Iterable[int] = (), *, names: Iterable[type[IntEnum]] = ()) -> None:
        """The set of `bits`; `names` are further enumerations that may name them. ValueError: a bit outside 0..127. TypeError: no bits."""
        found: dict[type[IntEnum], None] = dict.fromkeys(names)
        if isinstance(bits, Features):
            mask = bits._mask
            found.update(dict.fromkeys(bits._names))
        else:
            mask = 0
            if isinstance(bits, str | bytes) or not isinstance(bits, Iterable):
                raise arguments.wrong_type("features", bits, "bits, as {Feature.RING_PACKED}")
            for bit in bits:
                mask |= 1 << arguments.integer("feature bit", bit, 0, FEATURE_BITS - 1)
                if isinstance(bit, IntEnum):
                    found[type(bit)] = None
        object.__setattr__(self, "_mask", mask)
        object.__setattr__(self, "_names", tuple(found))

    @classmethod
    def from_mask(cls, mask: int, *, names: Iterable[type[IntEnum]] = ()) -> Features:
        """The set whose bit n is bit n of `mask`. ValueError: negative, or wider than 128 bits."""
        if not 0 <= arguments.number("feature mask", mask) < 1 << FEATURE_BITS:
            raise ValueError(f"feature mask {mask:#x} is outside 0..2**{FEATURE_BITS} - 1")
        return cls((bit for bit in range(mask.bit_length()) if mask >> bit & 1), names=names)

    @classmethod
    def from_words(cls, words: Iterable[int], *, names: Iterable[type[IntEnum]] = ()) -> Features:
        """The set of up to four 32-bit words, lowest first. ValueError: a word out of range, or a fifth."""
        mask = 0
        for number, word in enumerate(words):
            if number >= _WORDS:
                raise ValueError(f"more than {_WORDS} feature words")
            if not 0 <= word < 1 << WORD_BITS:
                raise ValueError(f"feature word {number} is {word:#x}, outside 0..2**{WORD_BITS} - 1")
            mask |= word << number * WORD_BITS
        return cls.from_mask(mask, names=names)

    @property
    def words(self) -> tuple[int, int, int, int]:
        """The four 32-bit words, lowest first."""
        low, second, third, high = (self._mask >> shift & (1 << WORD_BITS) - 1 for shift in range(0, FEATURE_BITS, WORD_BITS))
        return low, second, third, high

    def named(self, *names: type[IntEnum]) -> Features:
        """The same bits, named by `names` before the enumerations known already."""
        return Features(self, names=names)

    def __contains__(self, bit: object) -> bool:
        return isinstance(bit, int) and 0 <= bit < FEATURE_BITS and bool(self._mask >> bit & 1)

    def __iter__(self) -> Iterator[int]:
        return (self._member(bit) for bit in range(self._mask.bit_length()) if self._mask >> bit & 1)

    def __len__(self) -> int:
        return self._mask.bit_count()

    def __index__(self) -> int:
        return self._mask

    def __and__(self, other: Iterable[int]) -> Features:
        return self._with(other, lambda mine, theirs: mine & theirs)

    def __or__(self, other: Iterable[int]) -> Features:  # type: ignore[override]  # Set widens to a union of element types
        return self._with(other, lambda mine, theirs: mine | theirs)

    def __sub__(self, other: Iterable[int]) -> Features:
        return self._with(other, lambda mine, theirs: mine & ~theirs)

    def __xor__(self, other: Iterable[int]) -> Features:  # type: ignore[override]
        return self._with(other, lambda mine, theirs: mine ^ theirs)

    def __rsub__(self, other: Iterable[int]) -> Features:
        return self._with(other, lambda mine, theirs: theirs & ~mine)

    __rand__, __ror__, __rxor__ = __and__, __or__, __xor__

    def __hash__(self) -> int:
        return self._hash()  # that of a frozenset of the same numbers, which compares equal

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Features is immutable: cannot set {name}")

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, (self._mask, self._names)

    def __str__(self) -> str:
        return ", ".join(describe(bit) for bit in self) or "none"

    def __repr__(self) -> str:
        return f"Features({', '.join(bit.name if isinstance(bit, IntEnum) else str(bit) for bit in self)})"

    def _member(self, bit: int) -> int:
        known: tuple[type[IntEnum], ...] = (*self._names, Feature)
        return next((names(bit) for names in known if bit in names._value2member_map_), bit)

    def _with(self, other: Iterable[int], combine: Callable[[int, int], int]) -> Features:
        other = Features(other)
        return Features.from_mask(combine(self._mask, other._mask), names=(*self._names, *other._names))


def _restored(mask: int, names: tuple[type[IntEnum], ...]) -> Features:
    return Features.from_mask(mask, names=names)


def features_of(what: str, bits: Iterable[int], *, names: Iterable[type[IntEnum]] = ()) -> Features:
    """As `Features`, of an argument: an error names it."""
    try:
        return Features(bits, names=names)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{what}: {error}") from None


def check_choice(what: str, value: object, known: Features) -> None:
    """TypeError: `value` is no `Features`. ValueError: some of it are not among those that are known."""
    found = arguments.instance(what.replace(" ", "_"), value, Features, "Features, a choice from PROTOCOL")
    if more := [int(bit) for bit in sorted(found - known)]:
        raise ValueError(f"{what} {more} are not among those that it knows, {[int(bit) for bit in sorted(known)]}")


def describe(bit: int) -> str:
    """`GUEST_TSO4 (bit 7)` for a member of an enumeration, `bit 7` for a plain number."""
    return f"{bit.name} (bit {bit.value})" if isinstance(bit, IntEnum) else f"bit {bit}"


@final
class Requires:
    """A rule between features: who accepts `feature` must have accepted every one of `needs`, where a tuple stands for "any one of these".

    `Requires(HASH_TUNNEL, CTRL_VQ, (RSS, HASH_REPORT), section="5.1.3.1")` is: HASH_TUNNEL needs CTRL_VQ, and RSS or HASH_REPORT.
    """

    __slots__ = ("feature", "needs", "section")

    def __init__(self, feature: IntEnum, *needs: IntEnum | tuple[IntEnum, ...], section: str) -> None:
        if not needs or () in needs:
            raise ValueError(f"{describe(feature)} needs at least one feature, and one of each alternative")
        self.feature = feature
        self.needs = tuple(need if isinstance(need, tuple) else (need,) for need in needs)
        self.section = section

    def unmet(self, features: Features) -> tuple[tuple[IntEnum, ...], ...]:
        """What is missing from `features`, a tuple of alternatives each; empty if the rule holds or does not apply."""
        if self.feature not in features:
            return ()
        return tuple(need for need in self.needs if not any(bit in features for bit in need))

    def __repr__(self) -> str:
        needs = " and ".join(" or ".join(bit.name for bit in need) for need in self.needs)
        return f"<{self.feature.name} requires {needs} ({self.section})>"


def broken_rules(features: Features, rules: Iterable[Requires]) -> list[Requires]:
    """The rules that `features` does not keep, in their order. A device checks what it is about to offer with it (2.2.2)."""
    return [rule for rule in rules if rule.unmet(features)]


def select(
    offered: Features,
    *,
    required: Iterable[int] = (),
    wanted: Iterable[int] = (),
    rules: Iterable[Requires] = (),
    carried: Iterable[int] | None = None,
) -> Features:
    """What a driver accepts of `offered`: all of `required`, and of `wanted` whatever is offered and keeps the rules (2.2.1).

    `carried` are the bits that the transport supports, if not all. A wanted bit that cannot be had, or whose rule cannot be kept, is left
    out; for a required one FeatureNegotiationError names each such bit and why, with `missing` set to them.
    """
    required, rules = Features(required), tuple(rules)
    asked = required | Features(wanted)
    available = offered if carried is None else offered & carried
    accepted = asked & available
    causes: dict[int, str] = {}
    while broken := broken_rules(accepted, rules):  # leaving a bit out may break the rule of another
        for rule in broken:
            causes.setdefault(int(rule.feature), _cause(rule, accepted, available, asked))
        accepted = accepted - [rule.feature for rule in broken]
    missing = required - accepted
    if missing:
        reasons = [f"{describe(bit)} {causes.get(int(bit)) or _absence(bit, offered)}" for bit in missing]
        raise FeatureNegotiationError("; ".join(reasons), offered, missing)
    return accepted


def check_accepted(accepted: Features, offered: Features, rules: Iterable[Requires] = (), *, assumed: Iterable[int] = ()) -> None:
    """What a device checks before FEATURES_OK sticks (2.2.2, 3.1.1): `accepted` lies within `offered`, and keeps the rules.

    `assumed` are bits that somebody else negotiates, and that the rules take for accepted: over vhost-user the front-end may own
    the control queue. FeatureNegotiationError: `missing` is what was accepted but not offered, and what lacks a feature that it needs.
    """
    foreign = accepted - offered
    reasons = [f"{describe(bit)} was accepted but not offered" for bit in foreign]
    present = accepted | assumed
    unkept = [rule for rule in broken_rules(present, rules) if rule.feature in accepted]
    for rule in unkept:
        reasons.append(f"{describe(rule.feature)} needs {_alternatives(rule.unmet(present))}, not accepted ({rule.section})")
    if reasons:
        raise FeatureNegotiationError("; ".join(reasons), offered, foreign | [rule.feature for rule in unkept])


def _absence(bit: int, offered: Features) -> str:
    return "is offered, but this transport does not carry it" if bit in offered else "is not offered by the device"


def _alternatives(needs: Iterable[tuple[IntEnum, ...]]) -> str:
    return " and ".join(" or ".join(describe(bit) for bit in need) for need in needs)


def _cause(rule: Requires, accepted: Features, available: Features, asked: Features) -> str:
    needs = rule.unmet(accepted)
    if any(not any(bit in available for bit in need) for need in needs):
        why = "not offered by the device"
    elif any(not any(bit in asked for bit in need) for need in needs):
        why = "which nobody asked for"
    else:
        why = "left out for its own needs"
    return f"needs {_alternatives(needs)}, {why} ({rule.section})"

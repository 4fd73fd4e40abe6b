"""Kinds of values on the command line, and what is said of those that are none."""

import os
from typing import Any, Final

import click
from click.shell_completion import CompletionItem

LONGEST_PATH: Final = 107
"""Bytes of a socket's path that the kernel takes."""


class Number(click.IntRange):
    """A whole number within limits."""

    name = "number"


class SocketPath(click.ParamType[str]):
    """The path of a socket."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """What cannot be one is told before anything else happens."""
        length = len(os.fsencode(value))
        if not 0 < length <= LONGEST_PATH or "\0" in value:
            self.fail(f"{value!r} has {length} bytes: the path of a socket has 1 to {LONGEST_PATH}", param, ctx)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The shell knows files."""
        return [CompletionItem(incomplete, type="file")]


class MacAddress(click.ParamType[bytes]):
    """The Ethernet address of one device."""

    name = "mac"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        """Six numbers in hexadecimal, with colons between them."""
        if isinstance(value, bytes):
            return value
        parts = str(value).split(":")
        try:
            mac = bytes(int(part, 16) for part in parts if 1 <= len(part) <= 2 and part.isalnum())
        except ValueError:
            mac = b""
        if len(parts) != 6 or len(mac) != 6:
            self.fail(f"{value!r} is not six numbers like 52:54:00:12:34:56", param, ctx)
        if mac[0] & 1 or not any(mac):
            self.fail(f"{value!r} is not the address of one device", param, ctx)
        return mac

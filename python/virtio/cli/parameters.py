"""Kinds of values on the command line, and what is said of those that are none."""

from typing import Any

import click
from click.shell_completion import CompletionItem

from virtio import arguments


class Number(click.IntRange):
    """A whole number within limits."""

    name = "number"


class SocketPath(click.ParamType[str]):
    """The path of a socket."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """What cannot be one is told before anything else happens."""
        from virtio.vhost_user.socket import check_path

        try:
            return check_path(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The shell knows files."""
        return [CompletionItem(incomplete, type="file")]


class MacAddress(click.ParamType[bytes]):
    """The Ethernet address of one device."""

    name = "mac"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        """Six numbers in hexadecimal, with colons between them."""
        parts = str(value).split(":")
        try:
            data = bytes(int(part, 16) for part in parts if 1 <= len(part) <= 2 and part.isalnum())
        except ValueError:
            data = b""
        if len(parts) != 6 or len(data) != 6:
            self.fail(f"{value!r} is not six numbers like 52:54:00:12:34:56", param, ctx)
        try:
            return arguments.mac("Ethernet address", data)
        except ValueError as error:
            self.fail(str(error), param, ctx)

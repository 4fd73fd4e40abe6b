"""What `help()` shows of the binding: the first sentence of each text in the stub."""

import ast
import re
from pathlib import Path
from types import ModuleType

import pytest

from virtio import _core

STUB = ast.parse((Path(__file__).parents[1] / "python/virtio/_core.pyi").read_text())


def texts(body: list[ast.stmt], prefix: str = "") -> dict[str, str]:
    """Docstrings of the stub by dotted name. A setter's is its getter's, and what Python calls by itself it documents by itself."""
    found: dict[str, str] = {}
    for node in body:
        if isinstance(node, ast.ClassDef):
            found |= {node.name: ast.get_docstring(node) or ""} | texts(node.body, f"{node.name}.")
        elif (
            isinstance(node, ast.FunctionDef)
            and (text := ast.get_docstring(node))
            and not re.fullmatch(r"__(?!enter|exit)\w+__", node.name)
        ):
            found[prefix + node.name] = text
    return found


TEXTS = texts(STUB.body)


def shown(of: object) -> dict[str, str | None]:
    """Docstrings of all public names at run time."""
    found: dict[str, str | None] = {}
    for name, value in vars(of).items():
        if not name.startswith("_") and not isinstance(value, int):
            found[name] = value.__doc__
            if isinstance(value, type):
                found |= {f"{name}.{member}": text for member, text in shown(value).items()}
    return found


def first_sentence(text: str) -> str:
    return re.split(r"(?<=\.)\s", " ".join(text.split()), maxsplit=1)[0]


def test_every_public_name_of_the_core_says_what_it_is() -> None:
    assert isinstance(_core, ModuleType) and first_sentence(_core.__doc__ or "") == first_sentence(ast.get_docstring(STUB) or "")
    found = shown(_core)
    assert {"BufferPool", "BufferPool.burst", "Chain.read", "DeviceQueue.base", "layout"} <= set(found)
    assert not [name for name, text in found.items() if not text]
    assert not set(found) - set(TEXTS)


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_help_shows_the_first_sentence_of_the_stub(name: str) -> None:
    value: object = _core
    for part in name.split("."):
        value = getattr(value, part)
    assert value.__doc__ == first_sentence(TEXTS[name])

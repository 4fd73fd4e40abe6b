"""The house's order: who may import whom, where `unsafe` may stand, how long a file may be.

A file imports from floors below, or from its own floor without a cycle, and never across: device types and transports do not know each
other.
"""

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "virtio"
LINES = 600
LONGER = {"python/virtio/_core.pyi": 1200}  # one module has one stub

# Floor and wing of every module, by the longest prefix that fits. Within floor 4 the two wings never import each other.
PLACES: dict[str, tuple[int, str]] = {
    "virtio": (5, ""),
    "virtio.__main__": (5, ""),
    "virtio.cli": (5, ""),
    "virtio.bench": (5, ""),
    "virtio.devices": (4, "device types"),
    "virtio.transport": (4, "transports"),
    "virtio.vhost_user.backend": (4, "transports"),
    "virtio.netdev": (4, "transports"),
    "virtio.baseline": (4, "transports"),
    "virtio.port": (3, ""),
    "virtio.driver": (3, ""),
    "virtio.device": (3, ""),
    "virtio.device_status": (3, ""),
    "virtio.status": (3, ""),
    "virtio.pci": (3, ""),
    "virtio.vhost_user": (3, ""),
    "virtio.testing": (3, ""),
    "virtio.memory": (2, ""),
    "virtio.pool": (2, ""),
    "virtio.waiting": (2, ""),
    "virtio.arguments": (1, ""),
    "virtio.locks": (1, ""),
    "virtio.spec": (1, ""),
    "virtio.features": (1, ""),
    "virtio.errors": (1, ""),
    "virtio._core": (1, ""),
}
EXACT = {"virtio.transport": (3, "")}  # its __init__ holds the protocol; transports are the modules in it

# Crates in order; one depends only on those of a lower floor.
CRATES = {"virtio-memory": 0, "virtqueue": 1, "virtio-e1000": 1, "virtio-net-path": 2, "virtio-py": 3, "virtio-fuzz": 4}
CRATE_FOLDERS = sorted(path.parent for path in (ROOT / "rust").glob("*/Cargo.toml"))
MAY_BE_UNSAFE = ("rust/memory/", "rust/py/src/buffer.rs", "benches/peers/")  # the last is never shipped


def place(module: str) -> tuple[int, str] | None:
    """Floor and wing of a module; None if nobody has placed it."""
    if module in EXACT:
        return EXACT[module]
    parts = module.split(".")
    prefixes = [".".join(parts[:end]) for end in range(len(parts), 1, -1)] or [module]
    return next((PLACES[prefix] for prefix in prefixes if prefix in PLACES), None)


def modules() -> dict[str, Path]:
    """Every Python module of the package by its dotted name."""
    found = {"virtio._core": PACKAGE / "_core.pyi"}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(source: str, package: str) -> Iterator[str]:
    """What of this project `source`, a module in `package`, imports anywhere in it, for types or by name too."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            names = [inner if (inner := f"{origin}.{alias.name}") in MODULES else origin for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant) and isinstance(argument.value, str)]
        yield from (name for name in names if name.split(".")[0] == "virtio")


def imports_of(module: str) -> set[str]:
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return set(imports(path.read_text(), package)) - {module}


def misplaced(module: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that `module` may not import."""
    floor, wing = place(module) or (-1, "")
    found = []
    for name in sorted(names):
        below, other = place(name) or (6, "")
        if below > floor or (below == floor and wing and other and wing != other):
            found.append(f"{module} (floor {floor} {wing}) imports {name} (floor {below} {other})")
    return found


@cache
def files() -> list[Path]:
    """Every text file that belongs to the project: known to git, or new and not ignored."""
    listing = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_every_module_has_a_place() -> None:
    homeless = [module for module in MODULES if place(module) is None]
    assert not homeless, f"give these a floor in {Path(__file__).name}: {homeless}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_from_its_own_floor_or_below_and_never_across(module: str) -> None:
    assert not misplaced(module, imports_of(module))


def test_no_imports_in_a_circle() -> None:
    graph = {module: imports_of(module) for module in MODULES}
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"imports in a circle: {' -> '.join((*trail, module))}"
        if module not in done:
            for name in sorted(graph.get(module, ())):
                walk(name, (*trail, module))
            done.add(module)

    for module in graph:
        walk(module, ())


def test_the_check_itself_sees_an_import_that_goes_up_or_across() -> None:
    source = (
        "def f():\n    from virtio.devices.rng import Rng\n    import virtio.netdev\n    from .. import spec\n    from . import config\n"
    )
    seen = set(imports(source, "virtio.transport"))
    assert {"virtio.devices.rng", "virtio.netdev", "virtio.spec"} <= seen
    assert misplaced("virtio.transport.pci", ["virtio.devices.net", "virtio.netdev", "virtio.driver"]) == [
        "virtio.transport.pci (floor 4 transports) imports virtio.devices.net (floor 4 device types)"
    ]
    assert len(misplaced("virtio.devices.net", ["virtio.transport.pci", "virtio.transport", "virtio.devices.rng"])) == 1
    assert len(misplaced("virtio.pci.config", ["virtio", "virtio.transport.pci", "virtio.vhost_user.backend", "virtio.new"])) == 4


@pytest.mark.parametrize("folder", CRATE_FOLDERS, ids=lambda folder: folder.name)
def test_a_crate_depends_only_on_crates_below(folder: Path) -> None:
    manifest = tomllib.loads((folder / "Cargo.toml").read_text())
    name = manifest["package"]["name"]
    tables = [manifest, *manifest.get("target", {}).values()]
    needs = {crate for table in tables for kind in ("dependencies", "build-dependencies") for crate in table.get(kind, {})}
    above = [crate for crate in needs & CRATES.keys() if CRATES[crate] >= CRATES[name]]
    assert not above, f"{name} depends on {above}, not below it"
    assert ("pyo3" in needs) == (name == "virtio-py"), "pyo3 belongs to the binding alone"
    if name == "virtqueue":
        assert needs <= {"virtio-memory", "thiserror", "loom"}, "the rings do no I/O and bring nothing"


@pytest.mark.parametrize("crate", ["ring", "net"])
def test_a_crate_without_unsafe_forbids_it(crate: str) -> None:
    assert "#![forbid(unsafe_code)]" in (ROOT / "rust" / crate / "src/lib.rs").read_text()


def rust_code(text: str) -> str:
    """`text` without comments and strings (and without the character literal that looks like the start of one)."""
    return re.sub(r"""'"'|//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*\"""", "", text, flags=re.DOTALL)


def test_unsafe_stands_only_where_it_may() -> None:
    rust = [path for path in files() if path.suffix == ".rs" and not str(path.relative_to(ROOT)).startswith(MAY_BE_UNSAFE)]
    assert rust
    found = [str(path.relative_to(ROOT)) for path in rust if re.search(r"\bunsafe\b", rust_code(path.read_text()))]
    assert not found, f"unsafe outside {MAY_BE_UNSAFE}: {found}"


def test_no_source_file_is_too_long() -> None:
    sources = [path for path in files() if path.suffix in {".rs", ".py", ".pyi", ".sh"} or path.name == "Makefile"]
    long = {
        str(path.relative_to(ROOT)): lines
        for path in sources
        if (lines := len(path.read_text().splitlines())) > LONGER.get(str(path.relative_to(ROOT)), LINES)
    }
    assert not long, f"more than {LINES} lines: {long}"


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    places = re.compile(r"(?<![\w./~$})-])/(?:" + "|".join(["root", "work", "home", "Users", "opt"]) + r")/\w")
    texts = [path for path in files() if path.suffix not in {".lock", ".png", ".so"}]
    found = [str(path.relative_to(ROOT)) for path in texts if places.search(path.read_text(errors="replace"))]
    assert not found, f"machine paths in {found}"

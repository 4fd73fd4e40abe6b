"""What the documents say is so: programs run, rules name tests that exist, links lead somewhere, public names are there."""

import ast
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest

import virtio

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benches").glob("*.md"))]
INVARIANTS = (ROOT / "docs/invariants.md").read_text()

BUILT = {f"device-{number:02}" for number in range(1, 25)}
BUILT |= {f"driver-{number:02}" for number in range(1, 15)}
ALL = {f"device-{number:02}" for number in range(1, 25)} | {f"driver-{number:02}" for number in range(1, 15)}


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), flags=re.MULTILINE | re.DOTALL)


@cache
def names_in(path: Path) -> frozenset[str]:
    """Names of the tests in a Python or Rust file."""
    text = path.read_text()
    if path.suffix == ".rs":
        return frozenset(re.findall(r"#\[test\]\s+(?:#\[[^\n]*\]\s+)*fn (\w+)", text))
    return frozenset(node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))


def matches(reference: str) -> bool:
    """Whether `path::name` names a test; both may hold wildcards."""
    paths, _, name = reference.partition("::")
    return any(fnmatchcase(test, name) for path in ROOT.glob(paths) for test in names_in(path))


def rules() -> dict[str, str]:
    """Text under each heading that is a rule's number."""
    parts = re.split(r"^### ((?:device|driver)-\d\d): ", INVARIANTS, flags=re.MULTILINE)
    return {number: re.split(r"^## ", text, flags=re.MULTILINE)[0] for number, text in zip(parts[1::2], parts[2::2], strict=True)}


@pytest.mark.parametrize("program", blocks(ROOT / "README.md", "python"))
def test_programs_in_the_readme_run(program: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


@pytest.mark.parametrize("before", [[], ["unshare", "-Urn"]], ids=["root", "user namespace"])
def test_the_kernel_interfaces_of_the_readme_are_pinged(before: list[str], tmp_path: Path) -> None:
    (program,) = blocks(ROOT / "README.md", "python root")
    command = [*before, sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "3 packets transmitted, 3 received" in done.stdout, done.stdout + done.stderr
    assert not done.stderr


def test_the_readme_begins_with_a_program() -> None:
    assert blocks(ROOT / "README.md", "python")


def test_each_rule_is_either_built_or_listed_as_not_built() -> None:
    assert set(rules()) == BUILT
    later = INVARIANTS.partition("## Not built yet")[2]
    assert set(re.findall(r"(?:device|driver)-\d\d", later)) == ALL - BUILT


REFERENCE = re.compile(r"`([\w/.*]+::[\w*]+)`")


@pytest.mark.parametrize("number", sorted(BUILT))
def test_each_rule_names_its_tests(number: str) -> None:
    assert REFERENCE.search(rules()[number].partition("\nTests:")[2]), f"{number} names no test"


@pytest.mark.parametrize("reference", sorted(set(REFERENCE.findall(INVARIANTS))))
def test_tests_that_are_named_exist(reference: str) -> None:
    assert matches(reference)


def test_a_test_that_cites_a_rule_is_named_there() -> None:
    known = rules()
    for path in (*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "rust").glob("*/tests/**/*.rs")):
        for test in names_in(path):
            if cited := re.match(r"(?:test_)?((?:device|driver)_\d\d)_", test):
                references = REFERENCE.findall(known.get(cited[1].replace("_", "-"), ""))
                here = f"{path.relative_to(ROOT)}::{test}"
                assert any(fnmatchcase(here, reference) for reference in references), f"{here} is not among that rule's tests"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text())
    missing = [link for link in links if not (path.parent / link).exists()]
    assert not missing, f"{path.name} links to {missing}"


def test_make_targets_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for path in DOCUMENTS:
        named = set(re.findall(r"`make ([a-z-]+)`|^ *make ([a-z-]+)", path.read_text(), flags=re.MULTILINE))
        assert {name for pair in named for name in pair if name} <= targets, path.name


def test_every_public_name_is_there_and_says_what_it_is() -> None:
    assert sorted(virtio.__all__) == virtio.__all__ and set(virtio.__all__) <= set(dir(virtio))
    stub = ast.parse((ROOT / "python/virtio/_core.pyi").read_text())
    documented = {node.name for node in stub.body if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)}
    for name in virtio.__all__:
        assert name in documented or getattr(virtio, name).__doc__, f"virtio.{name} has no docstring"
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = virtio.no_such_name  # type: ignore[attr-defined]


def test_type_checkers_and_the_running_package_see_the_same_names() -> None:
    tree = ast.parse(Path(str(virtio.__file__)).read_text())
    shown = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    homes = {alias.name: node.module for node in shown.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted(homes) == virtio.__all__
    for name, module in homes.items():
        assert getattr(virtio, name) is getattr(sys.modules[str(module)], name)


def test_the_package_loads_neither_numpy_nor_the_core_before_they_are_needed() -> None:
    program = "import sys, virtio; virtio.Features({1}); print(*(m for m in sys.modules if m in ('numpy', 'virtio._core')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []

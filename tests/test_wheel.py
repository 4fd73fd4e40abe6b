"""The packages as a user gets them: built here, installed into empty environments, used there."""

import platform
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
GLIBC = (2, 28)


def run(*command: object, cwd: Path) -> str:
    """Output of a command; its errors are in the failure's message."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, as `make wheel` builds them."""
    folder = tmp_path_factory.mktemp("dist")
    run(ROOT / "scripts/wheel.sh", folder, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(packages: Path) -> Path:
    (path,) = packages.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(packages: Path) -> Path:
    (path,) = packages.glob("*.tar.gz")
    return path


def use(package: Path, folder: Path) -> None:
    """Installs `package` into an empty environment, and runs a first program there, far from the sources."""
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    python = folder / "venv/bin/python"
    run(python, "-m", "pip", "install", "--quiet", package, cwd=folder)
    where = run(python, "-I", "-c", "import virtio._core; print(virtio._core.__file__)", cwd=folder)
    assert Path(where.strip()).is_relative_to(folder / "venv")
    program = folder / "first.py"
    program.write_text((ROOT / "examples/rng.py").read_text())
    assert run(python, "-I", program, cwd=folder)


def test_the_wheel_installs_and_runs(wheel: Path, tmp_path: Path) -> None:
    use(wheel, tmp_path)


def test_the_sdist_builds_with_the_local_cargo_installs_and_runs(sdist: Path, tmp_path: Path) -> None:
    use(sdist, tmp_path)


def test_one_wheel_serves_all_pythons_and_old_c_libraries(wheel: Path) -> None:
    machine = platform.machine()
    assert wheel.name.endswith(f"-cp311-abi3-manylinux_2_28_{machine}.whl")
    report = run(sys.executable, "-m", "auditwheel", "show", wheel, cwd=wheel.parent)
    found = re.search(rf'platform\s+tag:\s+"manylinux_(\d+)_(\d+)_{machine}"', report)
    assert found, report
    assert (int(found[1]), int(found[2])) <= GLIBC


def test_the_wheel_holds_what_it_should_and_no_more(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"virtio/py.typed", "virtio/_core.pyi", "virtio/_core.abi3.so", "virtio/__init__.py"} <= set(names)
    for licence in ("LICENSE-MIT", "LICENSE-APACHE"):
        assert any(name.endswith(f".dist-info/licenses/{licence}") for name in names)
    assert {name.split("/")[0].rpartition(".")[2] for name in names} <= {"virtio", "dist-info"}
    (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    said = Parser().parsestr(zipfile.ZipFile(wheel).read(metadata).decode())
    assert said["License-Expression"] == "MIT OR Apache-2.0" and said["Requires-Python"] == ">=3.11"
    needs = [need for need in said.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert [re.split(r"\W", need)[0] for need in needs] == ["numpy", "click", "rich"]


def test_the_sdist_holds_what_it_takes_to_build(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    crates = {f"rust/{crate}/{part}" for crate in ("memory", "ring", "net", "py") for part in ("Cargo.toml", "src/lib.rs")}
    assert crates | {"Cargo.toml", "Cargo.lock", "pyproject.toml", "README.md", "LICENSE-MIT", "LICENSE-APACHE"} <= names
    assert not [name for name in names if name.startswith(("target/", ".venv/", "tests/"))]

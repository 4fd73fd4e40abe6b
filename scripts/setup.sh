#!/usr/bin/env bash
# Makes a machine ready to build and test: installs what is missing of the system's packages, and the development tools into .venv.
# Says what it does, and does nothing twice. PYTHON=... chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

script=setup
. scripts/packages.sh

find_python() {
    local name
    for name in ${PYTHON:-python3 python3.11 python3.12 python3.13 python3.14}; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    fail "no Python 3.11 or later found; PYTHON=/path/to/python chooses one"
}

missing=()
command -v cc >/dev/null || missing+=(gcc libc6-dev)
command -v c++ >/dev/null || missing+=(g++) # libFuzzer is C++
command -v git >/dev/null || missing+=(git)
command -v ip >/dev/null || missing+=(iproute2) # these two for tests of kernel interfaces
command -v ping >/dev/null || missing+=(iputils-ping)
command -v tcpdump >/dev/null || missing+=(tcpdump) # reads captures
python=$(find_python)
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
[ ${#missing[@]} -eq 0 ] || install_packages "${missing[@]}"

command -v cargo >/dev/null || fail "no cargo found: install Rust (stable, with rustfmt and clippy) first"
for tool in fmt clippy; do
    cargo "$tool" --version >/dev/null 2>&1 || fail "cargo $tool is missing: install that component of the Rust toolchain"
done

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    say "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi

wanted=$(sha256sum pyproject.toml)
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
    say "installing the development tools of pyproject.toml into .venv"
    .venv/bin/python - <<'LIST' >.venv/requirements.txt
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
print(*project["dependencies"], *(need for extra in extras.values() for need in extra if not need.startswith("virtio[")), sep="\n")
LIST
    .venv/bin/python -m pip install --quiet --upgrade --requirement .venv/requirements.txt
    printf '%s\n' "$wanted" >.venv/installed
fi

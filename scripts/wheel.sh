#!/usr/bin/env bash
# Builds the wheel (abi3, manylinux_2_28) and the sdist into a folder, dist/ by default. Further arguments go to `maturin build`.
# zig links against the old C library that the tag promises; it comes from PyPI, as maturin and auditwheel do, and all three are in .venv.
set -euo pipefail
folder=$(realpath -m "${1:-dist}")
shift || true
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

mkdir -p "$folder"
rm -f "$folder"/virtio-*
maturin build --release --locked --strip --zig --compatibility manylinux_2_28 --out "$folder" "$@"
maturin sdist --out "$folder"
for wheel in "$folder"/virtio-*.whl; do
    auditwheel show "$wheel"
done

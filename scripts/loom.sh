#!/usr/bin/env bash
# The loom model: the shipped publish, arm and decide code of both ring formats in every interleaving, whole and with each fence taken away.
# It has a folder of its own for what it builds, since it builds everything with --cfg loom.
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_TARGET_DIR="$PWD/target/loom" RUSTFLAGS="--cfg loom"
# Optimized, since there are many interleavings, but not as for a release: linking would take longer than the model.
export CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16
exec nice cargo test --quiet --locked --release --package virtqueue --test loom "$@"

#!/usr/bin/env bash
# Fuzzes each target for so many seconds (60 by default): first with a fault planted in the target's own reckoning, which must be found,
# then as it is, where nothing may be. One target at a time; further arguments are the targets, all of them by default. Corpora are kept in
# rust/fuzz/corpus, inputs that crash in rust/fuzz/artifacts.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
shift || true
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(chain_walk queue_ops split_packed)
plant_limit=900
# libFuzzer: inputs of up to 1 KiB, and one that takes 10 s counts as a hang.
options=(-max_len=1024 -timeout=10 -print_final_stats=0 -verbosity=1)

export PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin" RUSTC_BOOTSTRAP=1
if ! cargo fuzz --version >/dev/null 2>&1; then
    echo "fuzz: cargo-fuzz is missing: cargo install --locked cargo-fuzz" >&2
    exit 1
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
run() { # target, corpus, cargo-fuzz's and libFuzzer's options
    local target=$1 corpus=$2
    shift 2
    mkdir -p "$corpus"
    nice cargo fuzz run --fuzz-dir rust/fuzz "${features[@]}" "$target" "$corpus" -- "${options[@]}" "$@"
}

for target in "${targets[@]}"; do
    features=(--features planted)
    nice cargo fuzz build --fuzz-dir rust/fuzz "${features[@]}" "$target" 2>"$scratch/build" || { cat "$scratch/build" >&2; exit 1; }
    began=$SECONDS
    if run "$target" "$scratch/$target" -seed=1 -max_total_time=$plant_limit -artifact_prefix="$scratch/" >"$scratch/log" 2>&1 \
        || ! grep -q "panicked at" "$scratch/log"; then
        tail -n 40 "$scratch/log" >&2
        echo "fuzz: $target did not find the planted fault within $plant_limit s" >&2
        exit 1
    fi
    echo "fuzz: $target found the planted fault after $((SECONDS - began)) s"

    features=()
    nice cargo fuzz build --fuzz-dir rust/fuzz "$target" 2>"$scratch/build" || { cat "$scratch/build" >&2; exit 1; }
    if ! run "$target" "rust/fuzz/corpus/$target" -max_total_time="$seconds" >"$scratch/log" 2>&1; then
        tail -n 100 "$scratch/log" >&2
        echo "fuzz: $target failed" >&2
        exit 1
    fi
    echo "fuzz: $target: $(grep -E "^Done|^#[0-9]+.*DONE" "$scratch/log" | tail -n 1)"
done

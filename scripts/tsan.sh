#!/usr/bin/env bash
# The two-thread ring test under ThreadSanitizer: first a race on purpose, which must be reported, then everything else, where nothing may
# be. The sanitizer comes with the stable compiler; RUSTC_BOOTSTRAP=1 lets it be asked for. ROUNDS=n sends n chains through each ring.
set -euo pipefail
cd "$(dirname "$0")/.."
target=x86_64-unknown-linux-gnu
if [ "$(rustc --print host-tuple)" != "$target" ]; then
    echo "tsan: only on $target" >&2
    exit 1
fi
export CARGO_TARGET_DIR="$PWD/target/tsan" RUSTC_BOOTSTRAP=1 ROUNDS="${ROUNDS:-30000}"
export RUSTFLAGS="-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer --cfg tsan"
# The test harness hands results over through the standard library, which is not built for the sanitizer: that is no race, and not ours.
mkdir -p "$CARGO_TARGET_DIR"
echo "race:test::event::CompletedTest" >"$CARGO_TARGET_DIR/suppressions"
export TSAN_OPTIONS="suppressions=$CARGO_TARGET_DIR/suppressions"
race=a_peer_that_ignores_the_ring_garbles_bytes
run() { nice cargo test --quiet --locked --target "$target" --package virtqueue --test two_threads "$@"; }

run --no-run
if report=$(run -- --exact "$race" 2>&1) || ! grep -q "virtio_memory::raw::copy_in" <<<"$report"; then
    printf '%s\n' "$report"
    echo "tsan: the race on purpose was not reported" >&2
    exit 1
fi
echo "tsan: the race on purpose was reported"
run -- --skip "$race"

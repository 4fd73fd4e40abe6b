#!/usr/bin/env bash
# Runs make targets in order, stops at the first that fails, and says at the end how long each took and how many tests ran. A stage that
# hangs is ended after half an hour.
set -uo pipefail
cd "$(dirname "$0")/.."

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
status=0
table=""
for stage in "$@"; do
    printf '\n==> %s\n' "$stage"
    began=$SECONDS
    timeout --foreground --kill-after=10 30m "${MAKE:-make}" --no-print-directory "$stage" 2>&1 | tee "$logs/$stage"
    status=${PIPESTATUS[0]}
    result=ok
    [ "$status" -eq 0 ] || result=FAILED
    table+=$(printf '%-12s %4d s  %s' "$stage" $((SECONDS - began)) "$result")$'\n'
    [ "$status" -eq 0 ] || break
done

printf '\n%s%-12s %4d s\n' "$table" total "$SECONDS"
# cargo says "test result: ok. 3 passed; 0 failed; ...", pytest "=== 1 failed, 3 passed in 0.10s ===" (the frame only without -q)
cat "$logs"/* 2>/dev/null | awk -v broken="$status" '
    /^test result: / || /^=*( ?[0-9]+ [a-z]+,?)+ in [0-9.]+s/ {
        for (i = 2; i <= NF; i++) {
            if ($i ~ /^passed/) passed += $(i - 1)
            if ($i ~ /^(failed|error)/) failed += $(i - 1)
        }
    }
    END {
        if (broken && !failed) failed = 1
        printf "%d passed, %d failed\n", passed, failed
    }'
exit "$status"

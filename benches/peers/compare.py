"""Everything that is told in ratios, measured in one run: `python benches/peers/compare.py [--pairs 15]`.

Paired, alternating measurements on pinned cores; each ratio is a median with the interval that holds it in 19 of 20 cases (order
statistics), least and most. The yardsticks of the folder that VIRTIO_REFERENCE names run in the same run; without it their rows say so.
Prints markdown.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import python_ring

from virtio.bench.calls import Boundary, cost, nothing
from virtio.bench.pair import Pair
from virtio.bench.setup import pin

HERE = Path(__file__).parent
TOTAL = 1 << 21


def interval(samples: list[float]) -> tuple[float, float]:
    """Bounds of the median that hold with at least 95 percent, from the samples' order."""
    ordered, n = sorted(samples), len(samples)
    below = 0.0
    for k in range(n // 2):
        below += math.comb(n, k) / 2**n
        if below > 0.025:
            return ordered[max(k - 1, 0)], ordered[min(n - k, n - 1)]
    return ordered[0], ordered[-1]


def told(samples: list[float], digits: int = 1) -> str:
    low, high = interval(samples)
    parts = (statistics.median(samples), low, high, min(samples), max(samples))
    return "{} [{}, {}] ({} to {})".format(*(f"{x:.{digits}f}" for x in parts))


def paired(first: Callable[[], float], second: Callable[[], float], pairs: int) -> tuple[list[float], list[float], list[float]]:
    """Alternating measurements, and second / first of each pair."""
    a, b = [], []
    for turn in range(pairs):
        if turn % 2 == 0:
            a.append(first())
            b.append(second())
        else:
            b.append(second())
            a.append(first())
    return a, b, [y / x for x, y in zip(a, b, strict=True)]


def build() -> str:
    """The Rust program beside this file. Its path."""
    done = subprocess.run(
        ["cargo", "build", "--release", "--locked", "--message-format=json", "--manifest-path", str(HERE / "rings/Cargo.toml")],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found = [json.loads(line).get("executable") for line in done.stdout.splitlines()]
    return str(next(path for path in found if path))


def run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def rings(program: str, pairs: int) -> None:
    print("\n## Shipped rings against a bare ring (ring 256, burst 64; ns a buffer: median, least, most)\n")
    print("| ring | threads | bare | shipped | ratio |\n|---|---|---|---|---|")
    for line in run(program, "compare", str(pairs)).splitlines():
        row = json.loads(line)
        cells = ["{} ({} to {})".format(*row[key]) for key in ("bare_ns", "shipped_ns", "ratio")]
        print(f"| {row['ring']} | {row['threads']} | {' | '.join(cells)} |", flush=True)


def processes(program: str, pairs: int) -> None:
    print("\n## Two processes, Python at both ends, against two threads in Rust, the same crates (ring 256, burst 64; ns a buffer)\n")
    print("| ring | payload | Rust | Python | ratio |\n|---|---|---|---|---|")
    for ring_format in ("split", "packed"):
        for payload in (0, 60):
            pair = Pair(ring_format, payload=payload, total=TOTAL)
            command = (program, "bursts", "two", ring_format, "256", "64", str(payload), str(TOTAL))
            rust, python, ratios = paired(lambda c=command: float(run(*c)), pair.measure, pairs)  # type: ignore[misc]
            print(f"| {ring_format} | {payload} | {told(rust)} | {told(python)} | {told(ratios, 2)} |", flush=True)


def calls() -> None:
    print("\n## One burst call from Python, without ring work (ns, the loop's own cost taken off)\n")
    print("| call | items | ns |\n|---|---|---|")
    for items in (1, 8, 64, 256):
        boundary = Boundary(items)
        base = statistics.median(cost(nothing))
        for name, call in boundary.calls().items():
            print(f"| {name} | {items} | {told([x - base for x in cost(call)])} |", flush=True)
        boundary.check()


def yardsticks() -> None:
    print("\n## Yardsticks\n")
    print(f"- plain Python ring (benches/peers/python_ring.py), ns a buffer: {told([python_ring.measure() for _ in range(15)], 0)}")
    folder = os.environ.get("VIRTIO_REFERENCE")
    if not folder:
        print("- VIRTIO_REFERENCE is not set: the fixed yardsticks did not run.")
        return
    print("- fixed: " + run(sys.executable, str(Path(folder) / "pure_python_ring.py")).replace("\n", "\n- fixed: "))
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "bare-ring"
        shutil.copytree(Path(folder) / "bare-ring", copy)
        copy.chmod(0o755)
        command = ["cargo", "run", "--release", "--quiet", "--manifest-path", str(copy / "Cargo.toml"), "--", "15", "60"]
        for mode in ("split", "split-inorder", "packed", "packed-inorder"):
            lines = run(*command, mode).splitlines()
            wanted = [line for line in lines if "ring=256 batch=64 " in line]
            print("\n".join(f"- fixed: {line}" for line in wanted), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure everything that is told in ratios, in one run.")
    parser.add_argument("--pairs", type=int, default=15, help="paired measurements of each ratio (default 15)")
    pairs = parser.parse_args().pairs
    if pairs < 1:
        parser.error(f"--pairs {pairs} is less than 1")
    program = build()
    print(f"Cache line's round trip between cores 0 and 1, ns: {told([float(run(program, 'line')) for _ in range(5)])}")
    rings(program, pairs)
    processes(program, pairs)
    pin(0)
    calls()
    yardsticks()


if __name__ == "__main__":
    main()

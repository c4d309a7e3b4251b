"""The CPU time of a span of the timeline, with and without --timeline.

    python benchmarks/timeline.py       writes benchmarks/results/timeline.json

The spans are those of a rollout: requests with their sample, tokens and weight versions. The time
includes the thread that writes them. A sample has one span for its request, and one for its grade
unless grading takes no longer than a span. A group has one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.records import RESULTS, extremes, on_this_cpu, save  # noqa: E402
from vime.observe import spans  # noqa: E402

RESULT = RESULTS / "timeline.json"
NUM_SPANS, REPEATS = 100_000, 5
TARGET_US = 10.0  # of a sample's 1,800 in the client (docs/performance.md)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    figures = measure()
    for f in figures:
        low, high = f["spread"]
        print(f"{f['name']:<22} {f['value']:.3g} ({low:.3g} to {high:.3g}) {f['unit']}")
    save(args.output, figures)
    print(f"written to {args.output}")
    return 0


def measure() -> list[dict[str, Any]]:
    off = [cpu_us() for _ in range(REPEATS)]
    on, sizes = [], []
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory() as folder:
            spans.record(folder, "manager")
            on.append(cpu_us())
            spans.stop()
            sizes.append((Path(folder) / spans.FOLDER / "manager.jsonl").stat().st_size / NUM_SPANS)
    common = {**on_this_cpu(()), "num_spans": NUM_SPANS}
    return [
        {"name": "timeline/span_on", "unit": "us", **extremes(on), **common, "target": TARGET_US},
        {"name": "timeline/span_off", "unit": "us", **extremes(off), **common},
        {"name": "timeline/size", "unit": "bytes a span", **extremes(sizes), **common},
    ]  # fmt: skip


def cpu_us() -> float:
    """Microseconds of CPU time for one span, all threads of this process included."""
    began = time.process_time()
    for i in range(NUM_SPANS):
        with spans.span("generate", "engine 3", sample=f"12-{i}", tokens=512, versions=[12]):
            pass
        if i % 1000 == 999:  # as often as in a second with 1,000 spans
            spans.flush()
    return (time.process_time() - began) / NUM_SPANS * 1e6


if __name__ == "__main__":
    sys.exit(main())

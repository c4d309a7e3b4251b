"""The start of a run on a JSONL file of ten million prompts: memory and seconds.

    make bench-long-prompt-file

A process of its own checks and opens the file as a run does, and takes a shuffled batch. The cost
of the file is the peak resident memory of this process, less the peak of the same process on a file
of one batch. The target is 1.5 times the file's size. Mapped pages count while the system keeps
them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.records import RESULTS, on_this_cpu, save  # noqa: E402
from benchmarks.rollout import make_config  # noqa: E402
from vime.config.view import ArgsView  # noqa: E402
from vime.data.checks import data_problems  # noqa: E402
from vime.rollout.data_source import RolloutDataSourceWithBuffer  # noqa: E402

RESULT = RESULTS / "long_prompt_file.json"
TARGET = 1.5
BATCH = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=10_000_000)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(start(options.measure)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        from scripts.quickstart.model import write_checkpoint

        write_checkpoint(Path(folder, "model"), seed=0)
        small = measure(write_prompts(Path(folder, "small.jsonl"), BATCH))
        path = write_prompts(Path(folder, "long.jsonl"), options.lines)
        size = path.stat().st_size
        long = measure(path)
    share = (long["peak_bytes"] - small["peak_bytes"]) / size
    print(
        f"{options.lines:,} lines, {size / 1e9:.2f} GB: {long['seconds']:.1f} s to a first batch,"
    )
    print(f"memory {share:.2f} times the file (target {TARGET})")
    record = {
        "name": "long_prompt_file",
        "value": round(share, 3),
        "unit": "times the file's size",
        "peer": {"name": "target", "value": TARGET},
        "spread": None,
        "lines": options.lines,
        "bytes": size,
        "seconds": round(long["seconds"], 2),
        **on_this_cpu(("numpy", "orjson")),
    }
    save(options.output, record)
    return 0


def write_prompts(path: Path, count: int) -> Path:
    with path.open("w") as out:
        for i in range(count):
            out.write(f'{{"prompt": "What is {i} + {i % 997}?", "label": "{i + i % 997}"}}\n')
    return path


def measure(path: Path) -> dict[str, float]:
    words = [sys.executable, __file__, "--measure", str(path)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, timeout=900)
    return json.loads(done.stdout.splitlines()[-1])


def start(path: Path) -> dict[str, float]:
    folder = path.parent
    cfg = make_config(
        folder, model=folder / "model", prompts=path, num_prompts=BATCH, num_tokens=16
    )
    began = time.perf_counter()
    assert not list(data_problems(cfg))
    groups = RolloutDataSourceWithBuffer(ArgsView(cfg)).get_samples(BATCH)
    assert len({group[0].prompt for group in groups}) == BATCH
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak_bytes": peak}


if __name__ == "__main__":
    sys.exit(main())

"""The three loops side by side on CPU, with answers whose lengths have a long tail.

    make bench-async-loops

Trainer and engine have a CPU slot each. Every loop trains the quickstart's untrained model on the
same prompts, and sample number i has the same length in each: log-normal, 64 tokens on average, up
to 448. An engine of this model needs about as long for one sequence as for sixty, so a rollout
takes as long as its longest answer. The figures are the time of a step after the first ones, and
the ratio to the synchronous loop in the same call. The machine may have other work.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_assets import length_of  # noqa: E402
from benchmarks.records import RESULTS, on_this_cpu, quartiles, save  # noqa: E402
from tests.cpu.launching import Job  # noqa: E402
from vime.config.sections.rollout import FULLY_ASYNC  # noqa: E402

RESULT = RESULTS / "async_loops.json"
STALENESS = 4
WARM_UP = STALENESS + 2  # steps until the fully asynchronous loop has its usual pace
SHORTER = 16  # than the lengths of the GPU benchmarks
TARGET = 2.5
LOOPS: dict[str, tuple[str, dict[str, str | None]]] = {
    "synchronous": ("train.py", {}),
    "one ahead": ("train_async.py", {}),
    "fully asynchronous": (
        "train_async.py",
        {"--rollout-function-path": FULLY_ASYNC, "--max-staleness": str(STALENESS)},
    ),
}


async def long_tail(args: Any, sample: Any, sampling_params: dict[str, Any]) -> Any:
    """--custom-generate-function-path: sample number i always has the same length."""
    from vime.rollout.generation import generate

    longest = sampling_params["max_tokens"]
    count = max(1, length_of(sample.index, SHORTER * longest) // SHORTER)
    return await generate(args, sample, sampling_params | {"max_tokens": count, "ignore_eos": True})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=24)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vime-loops-") as folder:
        root = Path(folder)
        make_assets(root)
        records = {name: run(root, name, given.steps) for name in LOOPS}
    figures = summarize(records)
    for figure in figures:
        print(f"{figure['name']:45} {figure['value']:8.3f} {figure['unit']}  {figure['spread']}")
    save(RESULT, figures)
    return 0


def make_assets(root: Path) -> None:
    from scripts.quickstart.data import write_data
    from scripts.quickstart.model import write_checkpoint

    write_data(root, seed=0)
    write_checkpoint(root / "model", seed=0)


def run(root: Path, name: str, steps: int) -> list[dict[str, Any]]:
    """The metrics of the steps of one loop."""
    entry, flags = LOOPS[name]
    common: dict[str, str | None] = {
        "--colocate": "",
        "--rollout-num-gpus": "1",
        "--num-rollout": str(steps),
        "--rollout-max-response-len": "448",
        "--custom-generate-function-path": "benchmarks.async_loops.long_tail",
        "--use-rollout-logprobs": None,
        "--use-kl-loss": "",
        "--kl-loss-type": "",
        "--lr": "1e-5",
    }
    folder = root / name.replace(" ", "-")
    env = {"OMP_NUM_THREADS": "1"}
    job = Job(folder, root / "model", root / "train.jsonl", entry, {**common, **flags}, env)
    print(f"{name}: {steps} steps", flush=True)
    job.run(timeout_s=200 + 30 * steps)
    return [m for m in job.metrics() if "perf/step_time" in m][WARM_UP:]


def summarize(records: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    machine = {"peer": "train.py in the same call", **on_this_cpu()}
    figures = []
    for name, steps in records.items():
        key = f"async_loops/{name.replace(' ', '_')}"
        seconds = [m["perf/step_time"] for m in steps]
        tokens = [m["rollout/response_len/mean"] * m["rollout/num_samples"] for m in steps]
        figures.append({"name": f"{key}/step", **quartiles(seconds), "unit": "s", **machine})
        rate = sum(tokens) / sum(seconds)
        figures.append(_single(f"{key}/tokens_per_s", rate, "tokens/s", machine))
        age = [m.get("rollout/staleness/mean", 0.0) for m in steps]
        figures.append(_single(f"{key}/age_of_tokens", sum(age) / len(age), "versions", machine))
    rates = {f["name"]: f["value"] for f in figures if f["name"].endswith("tokens_per_s")}
    base = rates["async_loops/synchronous/tokens_per_s"]
    for name in list(LOOPS)[1:]:
        key = f"async_loops/{name.replace(' ', '_')}"
        ratio = rates[f"{key}/tokens_per_s"] / base
        target = {"target": TARGET} if name == "fully asynchronous" else {}
        figures.append(_single(f"{key}/speed_up", ratio, "1", machine | target))
    return figures


def _single(name: str, value: float, unit: str, more: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "value": round(value, 4), "spread": None, "unit": unit, **more}


if __name__ == "__main__":
    sys.exit(main())

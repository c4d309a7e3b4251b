"""The placement of the founding recipe on eight CPU slots instead of GPUs, with a tiny model.

    python benchmarks/eight_ranks.py             colocated, decoupled, async; a few steps each
    python benchmarks/eight_ranks.py decoupled   one of them

As in scripts/run-qwen3-4B.sh, trainers run TP 2 with sequence parallelism, and engines span two
slots. Colocated: 8 slots train and generate in turn (DP 4, 4 engines). Decoupled: 2 train and 6
generate (3 engines). Async: the same with train_async.py. Ray, Megatron over gloo, and vLLM are
real. The run shows that the layout works, not the speed of GPUs. Rewards are random, so every step
moves the weights. Each mode needs 24 GB of memory and some minutes.

Writes benchmarks/results/eight_ranks.json: the median step by phase, and the largest mean
difference between the log-probabilities of engine and trainer, over the steps whose own weights
sampled the tokens. In async that is only the first step. Later steps are one update behind, and
their difference must show it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.records import RESULTS, on_this_cpu, save  # noqa: E402
from vime.observe import read_metrics  # noqa: E402
from vime.observe.reading import STEP_TIME, phase_seconds  # noqa: E402

RESULT = RESULTS / "eight_ranks.json"
RUN_DIR = ROOT / "runs/bench-eight-ranks"
DRIFT = "train/train_rollout_logprob_abs_diff"
TARGET = 1e-4  # in float32 trainer and engine compute the same distribution
MODE_TIMEOUT_S = 1800
MODES = {
    "colocated": ("train.py", "--actor-num-gpus-per-node 8 --colocate"),
    "decoupled": ("train.py", "--actor-num-gpus-per-node 2 --rollout-num-gpus 6"),
    "async": (
        "train_async.py",
        "--actor-num-gpus-per-node 2 --rollout-num-gpus 6 --use-rollout-logprobs",
    ),
}
DATA = "--input-key prompt --label-key label --apply-chat-template --rm-type random"
LAYOUT = "--tensor-model-parallel-size 2 --sequence-parallel --rollout-num-gpus-per-engine 2"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
BATCH = (
    "--rollout-batch-size 8 --n-samples-per-prompt 8 --rollout-max-response-len 32 --balance-data "
    "--use-dynamic-batch-size --max-tokens-per-gpu 1024"
)
GRPO = (
    "--advantage-estimator grpo --use-kl-loss --kl-loss-coef 0.00 --kl-loss-type low_var_kl "
    "--eps-clip 0.2 --eps-clip-high 0.28 --lr 1e-4 --use-distributed-optimizer"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modes", nargs="*", metavar="MODE", help=f"of {', '.join(MODES)}")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    if unknown := set(args.modes) - set(MODES):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(MODES)}")
    assets = make_assets()
    figures = []
    for mode in args.modes or MODES:
        figures += figures_of(mode, run(mode, assets, args.steps))
        for f in figures[-2:]:
            print(f"{f['name']:<36}{f['value']:>12.3g} {f['unit']}", flush=True)
    save(args.output, figures)
    print(f"written to {args.output}")
    return 0 if all(f["value"] <= f["target"] for f in figures if "target" in f) else 1


def make_assets() -> Path:
    """The quickstart's model and prompts, untrained."""
    from scripts.quickstart.recipe import Recipe

    recipe = Recipe(RUN_DIR / "assets", seed=0)
    if not (recipe.blank_model / "config.json").exists():
        shutil.rmtree(recipe.run_dir, ignore_errors=True)
        recipe.make_assets()
    return recipe.run_dir


def run(mode: str, assets: Path, steps: int) -> list[dict[str, Any]]:
    """Runs a mode; its metrics, one record for each step. RUN_DIR/MODE/out.log has the output."""
    folder = RUN_DIR / mode
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    entry, cluster = MODES[mode]
    words = ["--hf-checkpoint", str(assets / "blank/hf"), "--run-dir", str(folder)]
    words += ["--prompt-data", str(assets / "data/train.jsonl"), "--num-rollout", str(steps)]
    words += f"{DATA} {cluster} {LAYOUT} {RECOMPUTE} {BATCH} {GRPO} --cpu-slots 8".split()
    log = folder / "out.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / entry), *words],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        code = process.wait(MODE_TIMEOUT_S)
    finally:
        process.terminate()  # also ends the run's own processes; does nothing if it has ended
        process.wait(60)
    if code:
        raise SystemExit(f"{mode} failed; the end of {log}:\n{log.read_text()[-3000:]}")
    return [m for m in read_metrics(folder / "metrics.jsonl") if "train/loss" in m]


def figures_of(mode: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Checks the steps of a mode, and returns its two figures."""
    machine = on_this_cpu()
    common = {**machine, "device": f"{machine['device']}, 8 slots", "num_steps": len(records)}
    still = [m["step"] for m in records if not m["train/grad_norm"] > 0]
    assert not still, f"{mode}: no gradient in steps {still}, so weight updates prove nothing"
    behind = [m["step"] - 1 - m["rollout/weight_version/min"] for m in records]  # updates
    assert max(behind) <= (mode == "async"), f"{mode}: rollouts {behind} updates behind"
    drifts = [m[DRIFT] for m, updates in zip(records, behind, strict=True) if updates == 0]
    moved = [m[DRIFT] for m, updates in zip(records, behind, strict=True) if updates > 0]
    assert all(d > TARGET for d in moved), (
        f"{mode}: updates left the log-probabilities as they were: {moved}"
    )
    steps = [m[STEP_TIME] for m in records]
    phases = [phase_seconds(m) for m in records]
    medians = {
        name: round(statistics.median(p.get(name, 0.0) for p in phases), 3) for name in phases[0]
    }
    return [
        {
            "name": f"eight_ranks/{mode}_logprob_diff",
            "value": max(drifts),
            "unit": "nat",
            "target": TARGET,
            "peer": {"name": "the engine's own log-probability", "value": 0.0},
            "spread": [min(drifts), max(drifts)],
            "one_update_behind": moved,
            **common,
        },
        {
            "name": f"eight_ranks/{mode}_step_time",
            "value": round(statistics.median(steps), 3),
            "unit": "s",
            "phases": medians,
            "spread": [round(min(steps), 3), round(max(steps), 3)],
            **common,
        },
    ]


if __name__ == "__main__":
    sys.exit(main())

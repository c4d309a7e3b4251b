"""Runs scripts/run-qwen3-4B.sh on 8 GPUs of one host (or 4, 2, 1), with random weights, by phase.

    python benchmarks/founding_recipe.py                        10 steps of each of the three modes
    python benchmarks/founding_recipe.py async --steps 5 --response 2048
    python benchmarks/founding_recipe.py --gpus 4               decoupled: 2 train, 2 generate
    python benchmarks/founding_recipe.py colocated --gpus 1     without tensor parallelism

The flags are the recipe's own, without checkpoints and evaluation. The model has random weights in
Qwen3-4B shapes. Its answers have log-normal lengths (`gpu_assets.length_of`: mean 1,024 tokens) up
to --response. The program prints the median step of each mode by phase, and writes
benchmarks/results/founding_recipe_MODE_N_gpus.json. Training's share is model FLOPs over the matrix
rate in train_mfu_4b.json, if that file exists.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_assets import PROMPT_TOKENS, length_of, write_model, write_prompts  # noqa: E402
from benchmarks.gpu_step import MISMATCH, PHASES, WARM_UP, summarize  # noqa: E402
from benchmarks.records import RESULTS, on_these_gpus, save  # noqa: E402
from benchmarks.scaling_model import QWEN3_4B, SAMPLES  # noqa: E402
from vime.observe import read_metrics  # noqa: E402

SCRIPT = ROOT / "scripts/run-qwen3-4B.sh"
MODES = ("colocated", "decoupled", "async")
TRAIN_GPUS = 2
LEFT_OUT = ("--save", "--load", "--eval-", "--n-samples-per-eval-prompt", "--rm-type")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modes", nargs="*", metavar="MODE", help=f"of {', '.join(MODES)}")
    parser.add_argument("--gpus", type=int, default=8, choices=(1, 2, 4, 8))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--response", type=int, default=8192)
    parser.add_argument("--work-dir", type=Path, default=Path("/tmp/vime-founding-recipe"))
    parser.add_argument("--print", action="store_true", help="only print the commands")
    args = parser.parse_args()
    if unknown := set(args.modes) - set(MODES):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(MODES)}")
    if args.gpus <= TRAIN_GPUS and args.modes != ["colocated"]:
        parser.error(f"--gpus {args.gpus} leaves no GPU to generate on: choose only colocated")
    prompts = write_prompts(args.work_dir / "prompts.jsonl")
    model = args.work_dir / "qwen3-4B"
    if not args.print:
        write_model(model, "4B")
    for mode in args.modes or MODES:
        run_dir = args.work_dir / mode
        command = command_of(mode, args, model, prompts, run_dir)
        if args.print:
            print(" ".join(command))
            continue
        env = {**os.environ, "VLLM_USE_FLASHINFER_SAMPLER": "0"}
        subprocess.run(command, check=True, env=env, cwd=ROOT)
        row = row_of(mode, args, run_dir)
        show(row)
        save(RESULTS / f"{row['name']}.json", row)
    return 0


def command_of(
    mode: str, args: argparse.Namespace, model: Path, prompts: Path, run_dir: Path
) -> list[str]:
    """The recipe's command line for a mode, with this benchmark's model, prompts and lengths."""
    printer = args.work_dir / "printer"
    printer.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    printer.chmod(0o755)
    variables = {
        "PYTHON": printer,
        "LAUNCH": "python",
        "MODE": mode,
        "HF_CHECKPOINT": model,
        "REF_LOAD": model,
        "PROMPT_DATA": prompts,
        "EVAL_DATA": prompts,
        "GPUS_PER_NODE": args.gpus,
        "TRAIN_GPUS": TRAIN_GPUS,
        "ROLLOUT_GPUS": args.gpus - TRAIN_GPUS,
    }
    env = os.environ | {name: str(value) for name, value in variables.items()}
    said = subprocess.run(
        ["bash", str(SCRIPT)], env=env, check=True, capture_output=True, text=True
    )
    entry, *words = said.stdout.splitlines()
    changed = ["--num-rollout", str(args.steps), "--rollout-max-response-len", str(args.response)]
    changed += ["--custom-generate-function-path", "benchmarks.gpu_assets.long_tail"]
    changed += ["--rm-type", "random", "--run-dir", str(run_dir), "--progress", "plain"]
    if args.gpus == 1:
        changed += ["--tensor-model-parallel-size", "1", "--rollout-num-gpus-per-engine", "1"]
    return [sys.executable, entry, *without(words, LEFT_OUT), *changed]


def without(words: list[str], names: tuple[str, ...]) -> list[str]:
    """The words without the flags that begin with one of the names, and without their values."""
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = word.startswith(names)
        if not dropping:
            kept.append(word)
    return kept


def row_of(mode: str, args: argparse.Namespace, run_dir: Path) -> dict[str, Any]:
    records = [r for r in read_metrics(run_dir / "metrics.jsonl") if "perf/step_time" in r]
    figures = summarize(records, overlapping=mode == "async")
    lengths = [length_of(i, args.response) for i in range(args.steps * SAMPLES)]
    mean = sum(lengths) / len(lengths)
    trained = SAMPLES * (mean + PROMPT_TOKENS)
    step, train = figures["step"]["value"], figures["train"]["value"]
    trainers = args.gpus if mode == "colocated" else TRAIN_GPUS
    return {
        "name": f"founding_recipe_{mode}_{args.gpus}_gpus",
        **figures["step"],
        "unit": "s",
        "peer": None,
        **on_these_gpus(),
        "phases": {name: figures[name] for name in PHASES},
        **{name: figures[name] for name in figures if "share" in name},
        "tokens_per_s_per_gpu": round(trained / step / args.gpus, 1),
        "mean_response": round(mean, 1),
        "longest_response": max(lengths),
        "train_share_of_matrix_rate": train_share(lengths, trained / train / trainers),
        "logprob_diff": [r[MISMATCH] for r in records[WARM_UP:] if MISMATCH in r],
    }


def train_share(lengths: list[int], tok_per_s: float) -> float | None:
    """Model FLOPs over the matrix rate, both as in benchmarks/train_mfu.py."""
    path = RESULTS / "train_mfu_4b.json"
    if not path.exists():
        return None
    whole = [length + PROMPT_TOKENS for length in lengths]
    flops = QWEN3_4B.training_flops(whole) / sum(whole)  # for each token
    rate = json.loads(path.read_text())["peer"]["value"] * 1e12
    return round(flops * tok_per_s / rate, 4)


def show(row: dict[str, Any]) -> None:
    print(f"\n{row['name']} on {row['device']}")
    for name, figure in row["phases"].items():
        print(f"  {name:16}{figure['value']:9.2f} s  {figure['value'] / row['value']:6.1%}")
    for name in ("tokens_per_s_per_gpu", "train_share_of_matrix_rate"):
        print(f"  {name}: {row[name]}")
    print(f"  {MISMATCH}: {' '.join(f'{m:.4f}' for m in row['logprob_diff'])}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

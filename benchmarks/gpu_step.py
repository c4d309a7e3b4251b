"""A whole GRPO step on GPUs, by phase, in Qwen3 shapes with random weights; beside TRL if asked.

    python benchmarks/gpu_step.py --shape 0.6B                         colocated, on one GPU
    python benchmarks/gpu_step.py --shape 0.6B --peer                  and TRL, see below
    python benchmarks/gpu_step.py --long-tail --peer                   log-normal lengths up to 8k
    python benchmarks/gpu_step.py --shape 4B --layout decoupled        NCCL between two GPUs
    python benchmarks/gpu_step.py --layout async                       train_async.py

32 prompts x 8 samples a step, as train.py runs them with the flags below: engines behind the
router, Megatron, live weight updates. Medians over the steps after the first two, quartiles as
spread. The framework's share is what neither vLLM's own work (generation, falling asleep, waking
up) nor the trainer's (log-probabilities, training, weight update) accounts for: moving state,
batching, Ray, logging. The share with sleeping and waking is given beside it. Colocated, the
engine gives up its memory while the trainer works; where the trainer's state fits beside it, it
stays (--no-offload-train). TRL runs afterwards on the same GPU, or, where another GPU is visible,
on that one at the same time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.cpu_step import spread  # noqa: E402
from benchmarks.gpu_assets import visible_gpus, write_model, write_prompts  # noqa: E402
from vime.observe import read_metrics  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
WARM_UP = 2  # steps that compile kernels and fill caches
PHASES = {
    "step": ("perf/step_time",),
    "rollout": ("perf/rollout_time",),
    "log_probs": ("perf/log_probs_time", "perf/ref_log_probs_time"),
    "train": ("perf/actor_train_time",),
    "weight_update": ("perf/update_weights_time",),
    "sleep_wake": ("perf/sleep_time", "perf/wake_up_time"),
    "offload_onload": ("perf/offload_time", "perf/onload_time"),
    "batching": ("perf/batching_time",),
}
WORK = ("rollout", "log_probs", "train", "weight_update")
MISMATCH = "train/train_rollout_logprob_abs_diff"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="0.6B", choices=("0.6B", "1.7B", "4B"))
    parser.add_argument(
        "--layout", default="colocated", choices=("colocated", "decoupled", "async")
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--response", type=int, help="tokens; 1,024, with --long-tail 8,192")
    parser.add_argument("--long-tail", action="store_true", help="mean 1,024, log-normal")
    parser.add_argument("--max-tokens", type=int, default=16384, help="of a micro-batch")
    parser.add_argument("--peer", action="store_true", help="TRL too")
    parser.add_argument("--peer-steps", type=int, default=4, help="the first is left out")
    parser.add_argument("--work-dir", type=Path, default=Path("/tmp/vime-gpu-step"))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("flags", nargs="*", help="more flags for train.py, after --")
    args = parser.parse_args()
    args.response = args.response or (8192 if args.long_tail else 1024)
    model = write_model(args.work_dir / f"qwen3-{args.shape}", args.shape)
    prompts = write_prompts(args.work_dir / "prompts.jsonl")
    gpus, peer = visible_gpus(), None
    try:
        if args.peer and args.layout == "colocated" and len(gpus) > 1:
            peer = start_trl(args, model, prompts, gpus[1])
            gpus = gpus[:1]
        figures = measure(args, model, prompts, gpus)
        if args.peer:
            peer = peer or start_trl(args, model, prompts, gpus[0])
            compare_with_trl(args, peer, figures["step"])
    finally:
        if peer is not None:
            peer.kill()
            peer.wait()
    return 0


def measure(
    args: argparse.Namespace, model: Path, prompts: Path, gpus: list[str]
) -> dict[str, dict[str, Any]]:
    """Runs the steps, shows them and writes the results. Returns the figures of `summarize`."""
    run_dir = args.work_dir / f"{args.shape}-{args.layout}"
    train(args, model, prompts, run_dir, gpus)
    records = [r for r in read_metrics(run_dir / "metrics.jsonl") if "perf/step_time" in r]
    figures = summarize(records, overlapping=args.layout == "async")
    show(args, figures, records)
    if args.layout != "colocated":
        compare_with_nvlink(figures["weight_update"], records[-1]["perf/update_weights_bytes"])
    write_results(args, figures)
    return figures


def train(
    args: argparse.Namespace, model: Path, prompts: Path, run_dir: Path, gpus: list[str]
) -> None:
    """`train.py` with the founding recipe's flags at this size. Raises if it fails."""
    entry = "train_async.py" if args.layout == "async" else "train.py"
    words = [sys.executable, str(ROOT / entry)]
    words += ["--hf-checkpoint", str(model), "--prompt-data", str(prompts)]
    words += ["--input-key", "prompt", "--label-key", "label", "--apply-chat-template"]
    words += ["--rollout-shuffle", "--rm-type", "random", "--num-rollout", str(args.steps)]
    words += ["--rollout-batch-size", "32", "--n-samples-per-prompt", "8"]
    words += ["--rollout-max-response-len", str(args.response), "--rollout-max-prompt-len", "256"]
    words += ["--balance-data", "--use-dynamic-batch-size", "--max-tokens-per-gpu"]
    words += [str(args.max_tokens), "--eps-clip", "0.2", "--eps-clip-high", "0.28", "--lr", "1e-6"]
    words += ["--adam-beta2", "0.98", "--weight-decay", "0.1", "--run-dir", str(run_dir)]
    words += ["--vllm-max-num-seqs", "256", "--progress", "plain", "--actor-num-gpus-per-node", "1"]
    if args.long_tail:
        words += ["--custom-generate-function-path", "benchmarks.gpu_assets.long_tail"]
    if args.layout == "colocated":
        words += ["--colocate", "--vllm-gpu-memory-utilization", "0.7"]
        words += ["--no-offload-train"] if args.shape == "0.6B" else []
    else:
        words += ["--rollout-num-gpus", "1", "--vllm-gpu-memory-utilization", "0.85"]
    words += ["--use-rollout-logprobs"] if args.layout == "async" else []
    env = {**os.environ, "VLLM_USE_FLASHINFER_SAMPLER": "0", **only(gpus)}
    subprocess.run([*words, *args.flags], check=True, env=env, cwd=ROOT)


def summarize(
    records: list[dict[str, Any]], *, overlapping: bool = False
) -> dict[str, dict[str, Any]]:
    """{phase: {"value": median s, "spread": quartiles}}, "framework" as a share of a step.

    overlapping  generation and training run at the same time: no share is left over for the rest
    """
    steps = []
    for record in records[WARM_UP:]:
        seconds = {p: sum(record.get(n, 0.0) for n in names) for p, names in PHASES.items()}
        beside = seconds["step"] - sum(seconds[p] for p in WORK)
        shares = {
            "framework_share": (beside - seconds["sleep_wake"]) / seconds["step"],
            "share_with_sleep_wake": beside / seconds["step"],
        }
        steps.append(seconds if overlapping else seconds | shares)
    assert steps, f"{len(records)} steps are too few: {WARM_UP} are left out first"
    return {name: spread([s[name] for s in steps]) for name in steps[0]}


def show(args: argparse.Namespace, figures: dict[str, Any], records: list[dict[str, Any]]) -> None:
    print(f"\n{args.shape} {args.layout}, {args.response} new tokens, on {device()}")
    whole = figures["step"]["value"]
    for name, figure in figures.items():
        low, high = figure["spread"]
        share = "" if "share" in name else f"{figure['value'] / whole:7.1%}"
        print(f"  {name:21} {figure['value']:9.3f}  [{low:.3f}, {high:.3f}] {share}")
    mismatch = [r[MISMATCH] for r in records if MISMATCH in r]
    print(f"  {MISMATCH}: {' '.join(f'{m:.4f}' for m in mismatch)}")
    last = records[-1]
    extra = ("perf/tokens_per_gpu_per_sec", "perf/actor_train_tok_per_s")
    for name in sorted(n for n in last if n in extra or n.startswith("perf/update_weights")):
        print(f"  {name}: {last[name]:.4g}")


def compare_with_nvlink(update: dict[str, Any], num_bytes: float) -> None:
    """Adds what share of a plain copy's rate between the two GPUs the whole update reaches."""
    import torch

    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda:0")
    target = torch.empty_like(source, device="cuda:1")
    rates = []
    for _ in range(10):
        torch.cuda.synchronize(0)
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(0)
        torch.cuda.synchronize(1)
        rates.append(source.numel() / (time.perf_counter() - started) / 1e9)
    rate = spread(rates[1:])["value"]
    reached = num_bytes / update["value"] / 1e9
    update |= {"GB_per_s": round(reached, 1), "nvlink_share": round(reached / rate, 3)}
    print(f"  update {reached:.0f} GB/s, {reached / rate:.0%} of a copy's {rate:.0f} GB/s")


def only(gpus: list[str]) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}


def start_trl(
    args: argparse.Namespace, model: Path, prompts: Path, gpu: str
) -> subprocess.Popen[bytes]:
    words = [sys.executable, str(ROOT / "benchmarks/peer_trl.py"), "--model", str(model)]
    words += ["--prompts", str(prompts), "--response", str(args.response)]
    words += ["--steps", str(args.peer_steps), *(["--long-tail"] if args.long_tail else [])]
    with trl_log(args).open("wb") as out:
        return subprocess.Popen(words, stdout=out, env={**os.environ, **only([gpu])}, cwd=ROOT)


def trl_log(args: argparse.Namespace) -> Path:
    return args.work_dir / "trl.log"


def compare_with_trl(
    args: argparse.Namespace, peer: subprocess.Popen[bytes], step: dict[str, Any]
) -> None:
    """Waits for TRL. The ratio is written anew after each of its steps: a run cut short keeps it.

    Raises SystemExit when TRL fails.
    """
    num_seen = 0
    while True:
        ended = peer.poll() is not None
        lines = [n for n in trl_log(args).read_text().split("\n")[:-1] if n.startswith('{"name"')]
        for line in lines[num_seen:]:  # the others are what its progress bar logs
            write_ratio(args, json.loads(line), step)
        num_seen = len(lines)
        if ended:
            break
        time.sleep(1)
    if peer.returncode:
        raise SystemExit(f"TRL failed with {peer.returncode}: see {trl_log(args)}")


def write_ratio(args: argparse.Namespace, found: dict[str, Any], step: dict[str, Any]) -> None:
    seconds = spread(found["steps"])
    print(
        f"  {found['name']}: step {seconds['value']:.2f} s {seconds['spread']}, {found}", flush=True
    )
    low, high = step["spread"]
    figure = {
        "value": round(seconds["value"] / step["value"], 3),
        "spread": [round(seconds["value"] / high, 3), round(seconds["value"] / low, 3)],
    }
    name = "grpo_step_vs_trl_long_tail" if args.long_tail else "grpo_step_vs_trl"
    peer = {"name": found["name"], **seconds}
    write(name, figure, "times as fast", peer, folder=args.output)


def write_results(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    size = args.shape.lower().replace(".", "_") + ("_long_tail" if args.long_tail else "")
    update = "colocated" if args.layout == "colocated" else "nccl"
    wanted = {f"weight_update_{update}_{size}_s": ("weight_update", "s")}
    wanted[f"grpo_step_{args.layout}_{size}_s"] = ("step", "s")
    if args.layout == "colocated":
        wanted[f"sleep_wake_{size}_s"] = ("sleep_wake", "s")
        share = "framework_share" if size == "0_6b" else f"framework_share_{size}"
        wanted[share] = ("framework_share", "1")
    for name, (figure, unit) in wanted.items():
        write(name, figures[figure], unit, folder=args.output)
    if args.layout == "colocated":
        both = figures["share_with_sleep_wake"]
        write(f"{share}_with_sleep_wake", both, "1", folder=args.output)


def write(
    name: str, figure: dict[str, Any], unit: str, peer: Any = None, *, folder: Path = RESULTS
) -> None:
    packages = ("torch", "vllm", "megatron-core", "ray", "transformers")
    versions = {"python": platform.python_version(), **{p: version(p) for p in packages}}
    record = {"name": name, **figure, "unit": unit, "peer": peer}
    record |= {"device": device(), "versions": versions}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


def device() -> str:
    import torch

    count = torch.cuda.device_count()
    return f"{count} x {torch.cuda.get_device_name(0)}" if count else "no GPU"


if __name__ == "__main__":
    sys.exit(main())

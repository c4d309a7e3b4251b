"""A whole GRPO step on GPUs, by phase, in Qwen3 shapes with random weights, and TRL's if asked.

    python benchmarks/gpu_step.py --shape 0.6B                         colocated, on one GPU
    python benchmarks/gpu_step.py --shape 0.6B --peer                  also TRL, see below
    python benchmarks/gpu_step.py --long-tail --peer                   log-normal lengths up to 8k
    python benchmarks/gpu_step.py --shape 4B --layout decoupled        NCCL between two GPUs
    python benchmarks/gpu_step.py --layout async                       train_async.py
    python benchmarks/gpu_step.py --layout fully-async --long-tail     generation never stops; on
                                                                       one GPU, with --max-staleness

train.py runs with the flags below: engines behind the router, Megatron, live weight updates, 32
prompts x 8 samples in a step. The figures are medians and quartiles of the steps after the first
two. The framework's share is the time outside vLLM's own work (generation, falling asleep, waking
up) and the trainer's (log-probabilities, training, weight update): moving state, batching, Ray,
logging. A second share counts sleeping and waking too. In the colocated layout the engine gives up
its memory while the trainer works; the trainer's state stays on the GPU if it fits
(--no-offload-train). TRL runs on another visible GPU at the same time, or else afterwards on the
same GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_step_peer  # noqa: E402
from benchmarks.gpu_assets import visible_gpus, write_model, write_prompts  # noqa: E402
from benchmarks.records import RESULTS, gpu_names, quartiles, save_gpu_figure  # noqa: E402
from vime.observe import read_metrics  # noqa: E402

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
        "--layout", default="colocated", choices=("colocated", "decoupled", "async", "fully-async")
    )
    parser.add_argument("--max-staleness", type=int, default=4, help="for --layout fully-async")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--response", type=int, help="tokens; 1,024, or 8,192 with --long-tail")
    parser.add_argument("--long-tail", action="store_true", help="log-normal lengths, mean 1,024")
    parser.add_argument("--max-tokens", type=int, default=16384, help="of a micro-batch")
    parser.add_argument("--peer", action="store_true", help="also run TRL")
    parser.add_argument("--peer-steps", type=int, default=4, help="the first does not count")
    parser.add_argument("--work-dir", type=Path, default=Path("/tmp/vime-gpu-step"))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for results")
    parser.add_argument("flags", nargs="*", help="more flags for train.py, after --")
    args = parser.parse_args()
    args.response = args.response or (8192 if args.long_tail else 1024)
    model = write_model(args.work_dir / f"qwen3-{args.shape}", args.shape)
    prompts = write_prompts(args.work_dir / "prompts.jsonl")
    gpus, peer = visible_gpus(), None
    try:
        if args.peer and args.layout == "colocated" and len(gpus) > 1:
            peer = gpu_step_peer.start(args, model, prompts, gpus[1])
            gpus = gpus[:1]
        figures = measure(args, model, prompts, gpus)
        if args.peer:
            peer = peer or gpu_step_peer.start(args, model, prompts, gpus[0])
            gpu_step_peer.compare(args, peer, figures["step"])
    finally:
        if peer is not None:
            peer.kill()
            peer.wait()
    return 0


def measure(
    args: argparse.Namespace, model: Path, prompts: Path, gpus: list[str]
) -> dict[str, dict[str, Any]]:
    """Runs and shows the steps, writes the results, and returns the figures of `summarize`."""
    run_dir = args.work_dir / f"{args.shape}-{args.layout}"
    train(args, model, prompts, run_dir, gpus)
    records = [r for r in read_metrics(run_dir / "metrics.jsonl") if "perf/step_time" in r]
    figures = summarize(
        records[args.max_staleness :] if args.layout == "fully-async" else records,
        overlapping="async" in args.layout,
    )
    show(args, figures, records)
    if args.layout in ("decoupled", "async"):
        compare_with_nvlink(figures["weight_update"], records[-1]["perf/update_weights_bytes"])
    write_results(args, figures)
    return figures


def train(
    args: argparse.Namespace, model: Path, prompts: Path, run_dir: Path, gpus: list[str]
) -> None:
    """Runs `train.py` with the founding recipe's flags at this size. Raises if it fails."""
    entry = "train_async.py" if "async" in args.layout else "train.py"
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
    elif args.layout == "fully-async":
        words += ["--colocate", "--no-offload-train", "--no-offload-rollout"]
        words += ["--vllm-gpu-memory-utilization", "0.5", "--vllm-server-concurrency", "256"]
        words += ["--rollout-function-path", "vime.rollout.fully_async.generate_rollout"]
        words += ["--max-staleness", str(args.max_staleness)]
    else:
        words += ["--rollout-num-gpus", "1", "--vllm-gpu-memory-utilization", "0.85"]
    words += ["--use-rollout-logprobs"] if args.layout == "async" else []
    env = {**os.environ, "VLLM_USE_FLASHINFER_SAMPLER": "0", "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    subprocess.run([*words, *args.flags], check=True, env=env, cwd=ROOT)


def summarize(
    records: list[dict[str, Any]], *, overlapping: bool = False
) -> dict[str, dict[str, Any]]:
    """{phase: {"value": median s, "spread": quartiles}}, and the framework's shares of a step.

    overlapping  generation and training run at the same time, so the framework has no share
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
    assert steps, f"{len(records)} steps are too few: the first {WARM_UP} do not count"
    return {name: quartiles([s[name] for s in steps]) for name in steps[0]}


def show(args: argparse.Namespace, figures: dict[str, Any], records: list[dict[str, Any]]) -> None:
    print(f"\n{args.shape} {args.layout}, {args.response} new tokens, on {gpu_names()}")
    whole = figures["step"]["value"]
    for name, figure in figures.items():
        low, high = figure["spread"]
        share = "" if "share" in name else f"{figure['value'] / whole:7.1%}"
        print(f"  {name:21} {figure['value']:9.3f}  [{low:.3f}, {high:.3f}] {share}")
    mismatch = [r[MISMATCH] for r in records if MISMATCH in r]
    print(f"  {MISMATCH}: {' '.join(f'{m:.4f}' for m in mismatch)}")
    last = records[-1]
    extra = ("perf/tokens_per_gpu_per_sec", "perf/actor_train_tok_per_s", "rollout/", "perf/gr")
    for name in sorted(n for n in last if n.startswith((*extra, "perf/update_weights"))):
        print(f"  {name}: {last[name]:.4g}")


def compare_with_nvlink(update: dict[str, Any], num_bytes: float) -> None:
    """Adds the update's rate, and its share of the rate of a plain copy between the two GPUs."""
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
    rate = quartiles(rates[1:])["value"]
    reached = num_bytes / update["value"] / 1e9
    update |= {"GB_per_s": round(reached, 1), "nvlink_share": round(reached / rate, 3)}
    print(f"  update {reached:.0f} GB/s, {reached / rate:.0%} of a copy's {rate:.0f} GB/s")


def write_results(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    size = args.shape.lower().replace(".", "_") + ("_long_tail" if args.long_tail else "")
    wanted = {}
    if args.layout != "fully-async":
        update = "colocated" if args.layout == "colocated" else "nccl"
        wanted[f"weight_update_{update}_{size}_s"] = ("weight_update", "s")
    wanted[f"grpo_step_{args.layout.replace('-', '_')}_{size}_s"] = ("step", "s")
    if args.layout == "colocated":
        wanted[f"sleep_wake_{size}_s"] = ("sleep_wake", "s")
        share = "framework_share" if size == "0_6b" else f"framework_share_{size}"
        wanted[share] = ("framework_share", "1")
    for name, (figure, unit) in wanted.items():
        save_gpu_figure(name, figures[figure], unit, folder=args.output)
    if args.layout == "colocated":
        both = figures["share_with_sleep_wake"]
        save_gpu_figure(f"{share}_with_sleep_wake", both, "1", folder=args.output)


if __name__ == "__main__":
    sys.exit(main())

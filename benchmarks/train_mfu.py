"""Training speed on one GPU: model FLOPs over what the GPU's own matrix product reaches.

    make bench-train-mfu      a table; writes benchmarks/results/train_mfu_4b.json and _0_6b.json
    PROFILE=1 make bench-train-mfu      and the 15 kernels that take most time of each case

Random weights in the shapes of Qwen3-4B (packs of 16,384 tokens in sequences of 8,192, forward and
backward) and of Qwen3-0.6B (sequences of 1,024, with the optimizer's step), in bfloat16 with
gradients summed in float32 where they fit. Model, micro-batch, policy loss, schedule and optimizer
are the trainer's own.

Model FLOPs of a token: 6 N + 6 L H D S. N counts every parameter once, the output layer being the
embedding's transpose; the second term is causal attention (2 products of H x D channels with S / 2
positions on average, 3 times: forward, and two gradients). What is computed again does not count.
The peer is an 8192 x 8192 x 8192 bfloat16 product of the same process. Each case runs in a process
of its own; times are CUDA events, the median of several steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "benchmarks/results"
TOKENS = 16_384
STEPS, WARM_UP = 7, 2
CHILD_LIMIT_S = 150
QWEN3 = {
    "vocab_size": 151_936,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "num_key_value_heads": 8,
}
SHAPES: dict[str, dict[str, Any]] = {
    "4b": {
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "intermediate_size": 9728,
    },
    "0.6b": {
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "intermediate_size": 3072,
    },
}
SEQUENCE = {"4b": 8192, "0.6b": 1024}
LIMIT = {"4b": {"NVIDIA H200": 0.60, "NVIDIA H100": 0.50}, "0.6b": {"": 0.35}}  # the targets
SAVING = {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "mlp_act"]}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", help="run one case here and print its JSON")
    parser.add_argument("--only", nargs="+", help="of: 4b 4b-plain 0.6b 0.6b-plain", default=None)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("train_mfu needs a CUDA GPU; there is none here", file=sys.stderr)
        return 2
    if args.case:
        print("RESULT " + json.dumps(measure(args.case)), flush=True)
        return 0
    found = {name: child(name) for name in args.only or cases()}
    for shape in SHAPES:
        if "mfu" in found.get(shape, {}):
            write(shape, found[shape], found.get(f"{shape}-plain"))
    show(found)
    return 0 if all("mfu" in f for f in found.values()) else 1


def cases() -> list[str]:
    return ["4b", "0.6b", "4b-plain", "0.6b-plain"]


def child(name: str) -> dict[str, Any]:
    """The case in a process of its own: its figures, or {"error": ...}."""
    plain = {"VIME_KERNELS": "plain"} if name.endswith("-plain") else {}
    command = [sys.executable, __file__, "--case", name]
    began = time.monotonic()
    try:
        done = subprocess.run(
            command,
            env=os.environ | plain,
            stdout=subprocess.PIPE,
            text=True,
            timeout=CHILD_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {CHILD_LIMIT_S} s"}
    lines = done.stdout.splitlines()
    print("\n".join(x for x in lines if not x.startswith("RESULT ")), flush=True)
    print(f"[{name}] {time.monotonic() - began:.0f} s", flush=True)
    results = [x.removeprefix("RESULT ") for x in lines if x.startswith("RESULT ")]
    if done.returncode or not results:
        return {"error": f"exit status {done.returncode}"}
    return json.loads(results[-1])


# -- one case --------------------------------------------------------------------------------------


def measure(name: str) -> dict[str, Any]:
    shape, plain = name.removesuffix("-plain"), name.endswith("-plain")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Pass(config_of(shape, plain, Path(folder)), with_optimizer=shape == "0.6b")
    batches, table = trainer.inputs(SEQUENCE[shape])
    rate = matrix_rate()

    def step() -> None:
        trainer.step(batches, table)

    times_ms = timed(step, STEPS, WARM_UP)
    if os.environ.get("PROFILE"):
        profile(step)
    middle = statistics.median(times_ms)
    flops = model_flops(shape, trainer.num_parameters)
    return {
        "mfu": flops / (middle / 1000) / rate,
        "spread": [flops / (t / 1000) / rate for t in (max(times_ms), min(times_ms))],
        "ms": middle,
        "tok_per_s": TOKENS / middle * 1000,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "matrix_tflops": rate / 1e12,
        "device": torch.cuda.get_device_name(),
        "kernels": trainer.kernels,
        "recompute": trainer.recompute,
        "loss": trainer.loss,
        "host_ms": host_time_ms(step),
    }


def model_flops(shape: str, num_parameters: int) -> float:
    s = SHAPES[shape]
    channels = s["num_attention_heads"] * QWEN3["head_dim"]
    attention = 6 * s["num_hidden_layers"] * channels * SEQUENCE[shape]
    return (6 * num_parameters + attention) * TOKENS


def config_of(shape: str, plain: bool, folder: Path) -> Any:
    """The trainer's configuration. A GPU of 80 GB has to save memory on 4B."""
    from dataclasses import fields
    from typing import get_type_hints

    from vime.config import Config

    described = QWEN3 | SHAPES[shape] | {"model_type": "qwen3", "dtype": "bfloat16"}
    described |= {"architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps(described))
    small = torch.cuda.get_device_properties(0).total_memory < 100 * 2**30
    saving = (FULL if plain else SAVING) if shape == "4b" and small else {}
    sections: dict[str, dict[str, Any]] = {
        "model": {"hf_checkpoint": str(folder)},
        "batch": {"prompts": 2},
        "cluster": {"actor_gpus_per_node": 1},
        "parallel": saving,
        "optimizer": {"accumulate_fp32": not (shape == "4b" and small)},
    }
    types = get_type_hints(Config)
    return Config(**{f.name: types[f.name](**sections.get(f.name, {})) for f in fields(Config)})


class Pass:
    """The trainer's model, loss and optimizer with random weights."""

    def __init__(self, cfg: Any, *, with_optimizer: bool) -> None:
        from vime.backends.megatron.parallel import initialize_parallel

        initialize_parallel(cfg, 0, 1)
        from vime.algorithms.hooks import TrainingHooks
        from vime.backends.megatron.kernels import chosen
        from vime.backends.megatron.losses import objective_of
        from vime.backends.megatron.model import build_model
        from vime.backends.megatron.optimizer import build_optimizer, wrap_for_training

        torch.manual_seed(0)
        self.cfg = cfg
        self.kernels = str(chosen())
        self.recompute = cfg.parallel.recompute_granularity or "none"
        self.chunks = wrap_for_training(cfg, build_model(cfg))
        with torch.no_grad():
            for p in self.chunks[0].parameters():
                p.fill_(1.0) if p.dim() == 1 else p.normal_(0, 0.02)
        self.num_parameters = sum(p.numel() for p in self.chunks[0].parameters())
        self.optimizer = build_optimizer(cfg, self.chunks)[0] if with_optimizer else None
        self.objective = objective_of(cfg.algorithm, TrainingHooks())
        self.loss = float("nan")

    def inputs(self, length: int) -> tuple[list, Any]:
        """One micro-batch of TOKENS in sequences of `length`, a prompt of a tenth each."""
        import numpy as np

        from vime.backends.megatron.layout import lay_out, token_table
        from vime.types import TrainSequence

        rng, count = np.random.default_rng(0), TOKENS // length
        response = length - length // 10
        sequences = [
            TrainSequence(
                index=i,
                group=0,
                tokens=rng.integers(0, QWEN3["vocab_size"], length),
                response_length=response,
                loss_mask=np.ones(response, np.float32),
                weight=np.full(response, 1 / response / count, np.float32),
                reward=float(i % 2) - 0.5,
                raw_reward=float(i % 2),
            )
            for i in range(count)
        ]
        table = token_table(sequences, range(count), torch.device("cuda"))
        return [lay_out(table, range(count), [length] * count)], table

    def step(self, batches: list, table: Any) -> None:
        from vime.backends.megatron.step import policy_judge, run_pass

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        judge = policy_judge(
            table, self.objective, table.score_N, table.column(), None, on_policy=True
        )
        sums = run_pass(self.chunks, batches, table, judge, temperature=1.0, forward_only=False)
        self.sums = sums
        if self.optimizer is not None:
            self.optimizer.prepare_grads()
            self.optimizer.get_grad_norm()
            self.optimizer.step()


def timed(step: Callable[[], Any], steps: int, warm_up: int) -> list[float]:
    """Milliseconds of each step by CUDA events. Nothing waits for the device in between."""
    for _ in range(warm_up):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]


def host_time_ms(step: Callable[[], Any]) -> float:
    """Milliseconds until the host has issued one step: near the step's time, the host limits."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    took = time.perf_counter() - began
    torch.cuda.synchronize()
    return took * 1000


def matrix_rate(size: int = 8192) -> float:
    """FLOP/s of a bfloat16 matrix product, the median of 20."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    times_ms = timed(lambda: torch.mm(a, b, out=out), 20, 5)
    return 2 * size**3 / (statistics.median(times_ms) / 1000)


def profile(step: Callable[[], Any], top: int = 15) -> None:
    """The kernels of one step that take most time, and the share of it that the GPU is busy."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        wall_ms = (time.perf_counter() - began) * 1000
    rows = [
        e for e in seen.key_averages() if e.self_device_time_total and not e.self_cpu_time_total
    ]
    rows.sort(key=lambda e: -e.self_device_time_total)
    busy_ms = sum(e.self_device_time_total for e in rows) / 1000
    print(f"GPU busy {busy_ms:.1f} ms of {wall_ms:.1f} ms (profiled)")
    for e in rows[:top]:
        print(f"{e.self_device_time_total / 1000:9.2f} ms {e.count:6d} x  {e.key[:110]}")


# -- what is shown and kept ------------------------------------------------------------------------


def target(shape: str, device: str) -> float | None:
    return next((t for name, t in LIMIT[shape].items() if name in device), None)


def write(shape: str, figures: dict[str, Any], plain: dict[str, Any] | None) -> None:
    record = {
        "name": f"train_mfu_{shape.replace('.', '_')}",
        "value": round(figures["mfu"], 4),
        "unit": "model FLOPs / matrix product FLOPs",
        "peer": {
            "name": "8192^3 bf16 product, TFLOP/s",
            "value": round(figures["matrix_tflops"], 1),
        },
        "device": figures["device"],
        "versions": {p: version(p) for p in ("torch", "triton", "megatron-core")},
        "spread": [round(x, 4) for x in figures["spread"]],
        "target": target(shape, figures["device"]),
        "ms": round(figures["ms"], 1),
        "tok_per_s": round(figures["tok_per_s"]),
        "peak_gib": round(figures["peak_gib"], 1),
        "kernels": figures["kernels"],
        "recompute": figures["recompute"],
        "plain": plain and {k: plain.get(k) for k in ("mfu", "ms", "peak_gib", "recompute")},
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{record['name']}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")


def show(found: dict[str, dict[str, Any]]) -> None:
    head = (
        "case",
        "of the matrix rate",
        "target",
        "ms",
        "tok/s",
        "host ms",
        "peak GiB",
        "recompute",
    )
    rows: list[Sequence[str]] = [head]
    for name, f in found.items():
        if "error" in f:
            rows.append((name, f["error"], *[""] * 6))
            continue
        low, high = f["spread"]
        wanted = target(name.removesuffix("-plain"), f["device"])
        rows.append(
            (
                name,
                f"{f['mfu']:.1%} ({low:.1%} to {high:.1%})",
                f"{wanted:.0%}" if wanted and "plain" not in name else "",
                f"{f['ms']:.0f}",
                f"{f['tok_per_s']:,.0f}",
                f"{f['host_ms']:.0f}",
                f"{f['peak_gib']:.1f}",
                f["recompute"],
            )
        )
    widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
    print()
    for row in rows:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
    ran = next((f for f in found.values() if "mfu" in f), None)
    if ran:
        print(f"\n{ran['device']}: {ran['matrix_tflops']:.0f} TFLOP/s; {ran['kernels']}")


if __name__ == "__main__":
    raise SystemExit(main())

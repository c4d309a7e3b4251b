"""Training speed of a GPU: model FLOPs over what the GPU's own matrix product reaches.

    make bench-train-mfu      a table; writes benchmarks/results/train_mfu_4b.json and _0_6b.json
    PROFILE=1 make bench-train-mfu      and the 15 kernels that take most time of each case
    python benchmarks/train_mfu.py --only 4b-tp2 4b-tp2-plain      on two GPUs

Random weights in the shapes of Qwen3-4B (packs of 16,384 tokens in sequences of 8,192, forward and
backward) and of Qwen3-0.6B (sequences of 1,024, with the optimizer's step), in bfloat16 with
gradients summed in float32 where they fit. Model, micro-batch, policy loss, schedule and optimizer
are the trainer's own. "4b-tp2" is what scripts/run-qwen3-4B.sh asks of two GPUs: tensor and
sequence parallelism, full recomputation, packs of up to 9,216 tokens, here of log-normal lengths.

Model FLOPs of a token: 6 N + 6 L H D S. N counts every parameter once, the output layer being the
embedding's transpose; the second term is causal attention (2 products of H x D channels with S / 2
positions on average, 3 times: forward, and two gradients). What is computed again does not count.
The peer is an 8192 x 8192 x 8192 bfloat16 product of the same process. Each case runs in processes
of its own; times are CUDA events, the median of several steps. "launch ms" is a step of sequences a
sixteenth as long, about what the host needs: near the step's time, it is the host that limits.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_assets import PROMPT_TOKENS, QWEN3, described, length_of  # noqa: E402
from vime.backends.megatron.hf.registry import architecture  # noqa: E402
from vime.plan.shape import Shape  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
STEPS, WARM_UP = 7, 2
CHILD_LIMIT_S = 150
LIMIT = {"4b": {"NVIDIA H200": 0.60, "NVIDIA H100": 0.50}, "0.6b": {"": 0.35}}  # the targets
SAVING = {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "mlp_act"]}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


@dataclass(frozen=True, slots=True)
class Case:
    """packs: the lengths of the sequences of each micro-batch of a step."""

    shape: str
    packs: tuple[tuple[int, ...], ...]
    tp: int = 1
    plain: bool = False

    @property
    def lengths(self) -> list[int]:
        return [length for pack in self.packs for length in pack]


@cache
def cases() -> dict[str, Case]:
    long, short, mixed = ((8192,) * 2,), ((1024,) * 16,), recipe_packs(samples=64)
    found = {"4b": Case("4b", long), "0.6b": Case("0.6b", short), "4b-tp2": Case("4b", mixed, tp=2)}
    plain = {f"{name}-plain": Case(c.shape, c.packs, c.tp, plain=True) for name, c in found.items()}
    return found | plain


def recipe_packs(samples: int) -> tuple[tuple[int, ...], ...]:
    """Packs of the lengths that benchmarks/founding_recipe.py generates."""
    from vime.data.packing import PackingRules, plan_step

    lengths = [length_of(i, 8192) + PROMPT_TOKENS for i in range(samples)]
    plan = plan_step(range(samples), lengths, PackingRules(max_tokens=9216))
    return tuple(tuple(lengths[i] for i in pack) for pack in plan.micro_batches[0])


def main() -> int:
    named = " ".join(cases())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", help="run one case here and print its JSON")
    parser.add_argument("--only", nargs="+", choices=cases(), metavar="CASE", help=f"of: {named}")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("train_mfu needs a CUDA GPU; there is none here", file=sys.stderr)
        return 2
    if args.case:
        figures = measure(cases()[args.case], int(os.environ.get("RANK", 0)))
        if figures:
            print("RESULT " + json.dumps(figures), flush=True)
        return 0
    alone = [name for name, case in cases().items() if case.tp == 1]
    found = {name: child(name) for name in args.only or alone}
    for name, case in cases().items():
        if not case.plain and "mfu" in found.get(name, {}):
            write(name, found[name], found.get(f"{name}-plain"))
    show(found)
    return 0 if all("mfu" in f for f in found.values()) else 1


def child(name: str) -> dict[str, Any]:
    """The case in processes of its own: its figures, or {"error": ...}."""
    case = cases()[name]
    plain = {"VIME_KERNELS": "plain"} if case.plain else {}
    ranks = f"-m torch.distributed.run --standalone --nproc-per-node={case.tp}".split()
    command = [sys.executable, *(ranks if case.tp > 1 else ()), __file__, "--case", name]
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


def measure(case: Case, rank: int) -> dict[str, Any]:
    """The figures; {} on ranks other than 0."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = config_of(case, Path(folder))
        trainer = Pass(cfg, rank, case.tp, with_optimizer=case.shape == "0.6b")
    batches, table = trainer.inputs(case.packs)
    rate = matrix_rate()

    def step() -> None:
        trainer.step(batches, table)

    times_ms = timed(step, STEPS, WARM_UP)
    peak_gib = torch.cuda.max_memory_allocated() / 2**30
    if os.environ.get("PROFILE"):
        profile(step, shown=rank == 0)
    little = trainer.inputs(shortened(case.packs))
    launch_ms = statistics.median(timed(lambda: trainer.step(*little), STEPS, WARM_UP))
    if rank:
        return {}
    middle = statistics.median(times_ms)
    shape = Shape.of(architecture(described(case.shape.upper())))
    flops = shape.training_flops(case.lengths) / case.tp
    return {
        "mfu": flops / (middle / 1000) / rate,
        "spread": [flops / (t / 1000) / rate for t in (max(times_ms), min(times_ms))],
        "ms": middle,
        "tok_per_s": sum(case.lengths) / case.tp / middle * 1000,
        "peak_gib": peak_gib,
        "matrix_tflops": rate / 1e12,
        "device": torch.cuda.get_device_name(),
        "gpus": case.tp,
        "kernels": trainer.kernels,
        "recompute": trainer.recompute,
        "launch_ms": launch_ms,
    }


def shortened(packs: Sequence[Sequence[int]]) -> list[list[int]]:
    """As many sequences, a sixteenth as long: a step's launches with little of its work."""
    return [[max(2, length // 16) for length in pack] for pack in packs]


def config_of(case: Case, folder: Path) -> Any:
    """The trainer's configuration. A GPU of 80 GB has to save memory on 4B."""
    from dataclasses import fields
    from typing import get_type_hints

    from vime.config import Config

    (folder / "config.json").write_text(json.dumps(described(case.shape.upper())))
    small = torch.cuda.get_device_properties(0).total_memory < 100 * 2**30
    alone = case.shape == "4b" and case.tp == 1 and small
    parallel = (FULL if case.plain else SAVING) if alone else {}
    if case.tp > 1:
        parallel = FULL | {"tp": case.tp, "sequence_parallel": True}
    sections: dict[str, dict[str, Any]] = {
        "model": {"hf_checkpoint": str(folder)},
        "batch": {"prompts": 2},
        "cluster": {"actor_gpus_per_node": case.tp},
        "parallel": parallel,
        "optimizer": {"accumulate_fp32": not alone},
    }
    types = get_type_hints(Config)
    return Config(**{f.name: types[f.name](**sections.get(f.name, {})) for f in fields(Config)})


class Pass:
    """The trainer's model, loss and optimizer with random weights, one GPU a rank."""

    def __init__(self, cfg: Any, rank: int, ranks: int, *, with_optimizer: bool) -> None:
        from vime import platform
        from vime.backends.megatron.parallel import initialize_parallel

        port = int(os.environ.get("MASTER_PORT", 0))  # torchrun's
        initialize_parallel(cfg, rank, ranks, rank, master_port=port)
        self.device = platform.current().device(rank)
        from vime.backends.megatron.kernels import chosen
        from vime.backends.megatron.model.build import build_model
        from vime.backends.megatron.training.losses import objective_of
        from vime.backends.megatron.training.optimizer import build_optimizer, wrap_for_training

        torch.manual_seed(0)
        self.cfg = cfg
        self.kernels = str(chosen())
        self.recompute = cfg.parallel.recompute_granularity or "none"
        self.chunks = wrap_for_training(cfg, build_model(cfg))
        with torch.no_grad():
            for p in self.chunks[0].parameters():
                p.fill_(1.0) if p.dim() == 1 else p.normal_(0, 0.02)
        self.optimizer = build_optimizer(cfg, self.chunks)[0] if with_optimizer else None
        self.objective = objective_of(cfg)

    def inputs(self, packs: Sequence[Sequence[int]]) -> tuple[list, Any]:
        """Micro-batches of sequences of these lengths, a prompt of a tenth each."""
        import numpy as np

        from vime.backends.megatron.training.token_table import lay_out, token_table
        from vime.types import TrainSequence

        rng, lengths = np.random.default_rng(0), [length for pack in packs for length in pack]
        sequences = []
        for i, length in enumerate(lengths):
            response = length - max(1, length // 10)
            sequences.append(
                TrainSequence(
                    index=i,
                    group=0,
                    tokens=rng.integers(0, QWEN3["vocab_size"], length),
                    response_length=response,
                    loss_mask=np.ones(response, np.float32),
                    weight=np.full(response, 1 / response / len(lengths), np.float32),
                    reward=float(i % 2) - 0.5,
                    raw_reward=float(i % 2),
                )
            )
        table = token_table(sequences, range(len(lengths)), self.device)
        shards = self.cfg.parallel.tp if self.cfg.parallel.sequence_parallel else 1
        batches, first = [], 0
        for pack in packs:
            members = range(first, first + len(pack))
            batches.append(lay_out(table, members, pack, tp_shards=shards))
            first += len(pack)
        return batches, table

    def step(self, batches: list, table: Any) -> None:
        from vime.backends.megatron.training.step import policy_judge, run_pass

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        judge = policy_judge(
            table, self.objective, table.score_N, table.column(), None, on_policy=True
        )
        run_pass(self.chunks, batches, table, judge, temperature=1.0, forward_only=False)
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


def matrix_rate(size: int = 8192) -> float:
    """FLOP/s of a bfloat16 matrix product, the median of 20."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    times_ms = timed(lambda: torch.mm(a, b, out=out), 20, 5)
    return 2 * size**3 / (statistics.median(times_ms) / 1000)


def profile(step: Callable[[], Any], top: int = 15, *, shown: bool = True) -> None:
    """The kernels of one step that take most time, and the share of it that the GPU is busy."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        wall_ms = (time.perf_counter() - began) * 1000
    if not shown:
        return
    rows = [  # kernels, without what annotates several of them
        e
        for e in seen.key_averages()
        if e.device_type == DeviceType.CUDA and not e.is_user_annotation
    ]
    rows.sort(key=lambda e: -e.self_device_time_total)
    busy_ms = sum(e.self_device_time_total for e in rows) / 1000
    print(f"GPU busy {busy_ms:.1f} ms of {wall_ms:.1f} ms (profiled)")
    for e in rows[:top]:
        print(f"{e.self_device_time_total / 1000:9.2f} ms {e.count:6d} x  {e.key[:110]}")


# -- what is shown and kept ------------------------------------------------------------------------


def target(name: str, device: str) -> float | None:
    return next((t for kind, t in LIMIT.get(name, {}).items() if kind in device), None)


def write(name: str, figures: dict[str, Any], plain: dict[str, Any] | None) -> None:
    kept = re.sub(r"\W", "_", name)
    record = {
        "name": f"train_mfu_{kept}",
        "value": round(figures["mfu"], 4),
        "unit": "model FLOPs / matrix product FLOPs",
        "peer": {
            "name": "8192^3 bf16 product, TFLOP/s",
            "value": round(figures["matrix_tflops"], 1),
        },
        "device": f"{figures['gpus']} x {figures['device']}",
        "versions": {p: version(p) for p in ("torch", "triton", "megatron-core")},
        "spread": [round(x, 4) for x in figures["spread"]],
        "target": target(name, figures["device"]),
        "ms": round(figures["ms"], 1),
        "tok_per_s": round(figures["tok_per_s"]),
        "peak_gib": round(figures["peak_gib"], 1),
        "launch_ms": round(figures["launch_ms"], 1),
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
        "tok/s a GPU",
        "launch ms",
        "peak GiB",
        "recompute",
    )
    rows: list[Sequence[str]] = [head]
    for name, f in found.items():
        if "error" in f:
            rows.append((name, f["error"], *[""] * 6))
            continue
        low, high = f["spread"]
        wanted = target(name, f["device"])
        rows.append(
            (
                name,
                f"{f['mfu']:.1%} ({low:.1%} to {high:.1%})",
                f"{wanted:.0%}" if wanted else "",
                f"{f['ms']:.0f}",
                f"{f['tok_per_s']:,.0f}",
                f"{f['launch_ms']:.0f}",
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

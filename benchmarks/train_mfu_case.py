"""One case of train_mfu.py, in a process of its own: `python benchmarks/train_mfu_case.py NAME`.

Model, micro-batches, policy loss, schedule and optimizer are the trainer's own, with random
weights. Rank 0 prints a line "RESULT " and the figures in JSON. With PROFILE=1 it also prints the
15 slowest kernels.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.configs import config_of  # noqa: E402
from benchmarks.gpu_assets import PROMPT_TOKENS, QWEN3, described, length_of  # noqa: E402
from benchmarks.gpu_timing import matrix_rate, profile, timed  # noqa: E402
from vime.backends.megatron.hf.registry import architecture  # noqa: E402
from vime.config import Config  # noqa: E402
from vime.plan.shape import Shape  # noqa: E402

RESULT = "RESULT "
STEPS, WARM_UP = 7, 2
SAVING = {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "mlp_act"]}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


@dataclass(frozen=True, slots=True)
class Case:
    """packs: the lengths of the sequences in each micro-batch of a step."""

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
    """Packs of sequences as long as those of benchmarks/founding_recipe.py."""
    from vime.data.packing import PackingRules, plan_step

    lengths = [length_of(i, 8192) + PROMPT_TOKENS for i in range(samples)]
    plan = plan_step(range(samples), lengths, PackingRules(max_tokens=9216))
    return tuple(tuple(lengths[i] for i in pack) for pack in plan.micro_batches[0])


def main() -> int:
    figures = measure(cases()[sys.argv[1]], int(os.environ.get("RANK", 0)))
    if figures:
        print(RESULT + json.dumps(figures), flush=True)
    return 0


def measure(case: Case, rank: int) -> dict[str, Any]:
    """The figures of the case; {} on ranks other than 0."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = trainer_config(case, Path(folder))
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
    """As many sequences, a sixteenth as long: the same kernel launches with little work."""
    return [[max(2, length // 16) for length in pack] for pack in packs]


def trainer_config(case: Case, folder: Path) -> Config:
    """The trainer's configuration. On a GPU of 80 GB, 4B has to save memory."""
    (folder / "config.json").write_text(json.dumps(described(case.shape.upper())))
    small = torch.cuda.get_device_properties(0).total_memory < 100 * 2**30
    alone = case.shape == "4b" and case.tp == 1 and small
    parallel = (FULL if case.plain else SAVING) if alone else {}
    if case.tp > 1:
        parallel = FULL | {"tp": case.tp, "sequence_parallel": True}
    return config_of(
        model={"hf_checkpoint": str(folder)},
        batch={"prompts": 2},
        cluster={"actor_gpus_per_node": case.tp},
        parallel=parallel,
        optimizer={"accumulate_fp32": not alone},
    )


class Pass:
    """The trainer's model, loss and optimizer with random weights, one GPU for each rank."""

    def __init__(self, cfg: Any, rank: int, ranks: int, *, with_optimizer: bool) -> None:
        from vime import platform
        from vime.backends.megatron.parallel import initialize_parallel

        port = int(os.environ.get("MASTER_PORT", 0))  # torchrun's
        initialize_parallel(cfg, rank, ranks, rank, master_port=port)
        self.device = platform.current().device(rank)
        from vime.backends.megatron.kernels.choice import chosen
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
        """Micro-batches of sequences with these lengths; a tenth of each is prompt."""
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
        from vime.backends.megatron.training.judges import policy_judge
        from vime.backends.megatron.training.passes import run_pass

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        judge = policy_judge(
            table, self.objective, table.mask_N, table.column(), None, on_policy=True
        )
        run_pass(self.chunks, batches, table, judge, temperature=1.0, forward_only=False)
        if self.optimizer is not None:
            self.optimizer.prepare_grads()
            self.optimizer.get_grad_norm()
            self.optimizer.step()


if __name__ == "__main__":
    sys.exit(main())

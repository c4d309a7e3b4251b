"""One case of memory.py, in a process of its own: `python benchmarks/memory_case.py NAME`.

The real trainer, built from flags with random weights, takes two GRPO steps of one full
micro-batch; the second step is measured. The last line printed is JSON: {component: [estimate,
measured]} in bytes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_assets import described  # noqa: E402
from vime.cli import parse_config  # noqa: E402
from vime.config import Config  # noqa: E402
from vime.plan.shape import shape_of  # noqa: E402
from vime.plan.trainer_memory import trainer_memory  # noqa: E402
from vime.platform import current  # noqa: E402
from vime.types import Sample, Status  # noqa: E402

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 256}
SHAPES = {
    "tiny": described("0.6B") | TINY,
    **{shape.lower(): described(shape) for shape in ("0.6B", "1.7B", "4B")},
}
SELECTIVE = "--recompute-granularity selective"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
BLOCK = "--recompute-granularity full --recompute-method block --recompute-num-layers 12"


@dataclass(frozen=True, slots=True)
class Case:
    """One micro-batch of `tokens`, in sequences of `length`."""

    shape: str
    tokens: int
    length: int
    flags: str = ""


CASES = {
    "0.6b-none": Case("0.6b", 16384, 1024),
    "0.6b-full": Case("0.6b", 32768, 8192, FULL),
    "1.7b-selective": Case("1.7b", 8192, 2048, SELECTIVE),
    "0.6b-ppo": Case("0.6b", 16384, 1024, "--advantage-estimator ppo"),
    "0.6b-block": Case("0.6b", 16384, 4096, BLOCK),
    "4b-full": Case("4b", 9216, 4608, FULL),  # 67 GiB of state
    "tiny": Case("tiny", 256, 64),
}


def main() -> int:
    print(json.dumps(compare(CASES[sys.argv[1]])))
    return 0


def compare(case: Case) -> dict[str, list[float]]:
    """{component: [estimate, measured]} in bytes; the last component is the peak."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = config(case, Path(folder))
        shape = shape_of(cfg)
        assert shape is not None
        memory = trainer_memory(cfg, shape, current().dtype(cfg.model.dtype).itemsize)
        measured = measure(cfg, case)
    estimate = {p.name: p.num_bytes for p in [*memory.held, *memory.passing]}
    held = {name: [estimate.pop(name), measured[name]] for name in list(estimate)[:3]}
    activations = estimate.pop("activations", 0.0)
    rest = measured["peak"] - sum(real for _, real in held.values()) - measured["activations"]
    return held | {
        "activations": [activations, measured["activations"]],
        memory.phase: [sum(estimate.values()), rest],
        "peak": [memory.peak, measured["peak"]],
    }


def config(case: Case, folder: Path) -> Config:
    (folder / "config.json").write_text(json.dumps(SHAPES[case.shape]))
    (folder / "prompts.jsonl").write_text('{"prompt": "1 + 1", "label": "2"}\n')
    words = ["--hf-checkpoint", str(folder), "--prompt-data", str(folder / "prompts.jsonl")]
    words += ["--input-key", "prompt", "--label-key", "label", "--rm-type", "math"]
    words += ["--actor-num-gpus-per-node", "1", "--rollout-batch-size", "1", "--num-rollout", "1"]
    words += ["--n-samples-per-prompt", str(case.tokens // case.length)]
    words += ["--use-dynamic-batch-size", "--max-tokens-per-gpu", str(case.tokens)]
    return parse_config([*words, *case.flags.split()])


def measure(cfg: Config, case: Case) -> dict[str, float]:
    """Bytes by component in the second of two steps; 0 without CUDA where only CUDA counts."""
    from vime.backends.megatron.checkpoints import load
    from vime.backends.megatron.trainer import MegatronTrainer
    from vime.data.batching import build_train_batch

    load.load_checkpoint = random_weights
    trainer = MegatronTrainer(cfg)
    batch = build_train_batch([samples(case)], cfg, 0)
    trainer.train(batch)  # creates the optimizer's state
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with kept_by_decoder(trainer.actor.chunks) as kept:
        trainer.train(batch)
    measured = {**held(trainer), "activations": max(kept), "peak": 0.0}
    if torch.cuda.is_available():
        measured["peak"] = torch.cuda.max_memory_allocated()
    trainer.close()
    return measured


def random_weights(cfg: Config, start: Any, chunks: Any, optimizer: Any = None, *_: Any) -> dict:
    """Stands in for loading a checkpoint: the same memory, without a file of gigabytes."""
    torch.manual_seed(0)
    with torch.no_grad():
        for chunk in chunks:
            for name, p in chunk.named_parameters():
                p.fill_(1.0) if "norm" in name else p.normal_(0.0, 0.02)
    if optimizer is not None:
        optimizer.reload_model_params()
    return {}


def samples(case: Case) -> list[Sample]:
    """One group with alternating rewards of 0 and 1; half of each sequence is response."""
    generator = torch.Generator().manual_seed(0)
    vocab = SHAPES[case.shape]["vocab_size"]
    return [
        Sample(
            group_index=0,
            index=i,
            tokens=torch.randint(vocab, (case.length,), generator=generator).tolist(),
            response_length=case.length // 2,
            reward=float(i % 2),
            status=Status.COMPLETED,
        )
        for i in range(case.tokens // case.length)
    ]


def held(trainer: Any) -> dict[str, float]:
    """Bytes of storages; each storage counts once, in the first component that has it."""
    seen: set[int] = set()

    def size(tensors: Iterable[Any]) -> float:
        num_bytes = 0
        for t in tensors:
            if torch.is_tensor(t) and t.device == trainer.device:
                storage = t.untyped_storage()
                num_bytes += 0 if storage.data_ptr() in seen else storage.nbytes()
                seen.add(storage.data_ptr())
        return float(num_bytes)

    buffers = [b for c in trainer.actor.chunks for b in (*c.buffers, *c.expert_parallel_buffers)]
    return {
        "weights": size(p.data for c in trainer.actor.chunks for p in c.parameters()),
        "gradients": size(b.grad_data for b in buffers),
        "optimizer": size(optimizer_tensors(trainer.actor.optimizer)),
    }


def optimizer_tensors(optimizer: Any) -> Iterator[Any]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            yield from (p.data for p in group["params"])
        for state in part.optimizer.state.values():
            yield from state.values()


@contextmanager
def kept_by_decoder(chunks: Any) -> Iterator[list[float]]:
    """Bytes that each forward pass with gradients leaves allocated."""
    from vime.backends.megatron.chunks import unwrap

    kept, before = [0.0], [0]

    def enter(*_: Any) -> None:
        before[0] = torch.cuda.memory_allocated()

    def leave(*_: Any) -> None:
        if torch.is_grad_enabled():
            kept.append(float(torch.cuda.memory_allocated() - before[0]))

    decoders = [unwrap(chunk).decoder for chunk in chunks]
    hooks = [d.register_forward_pre_hook(enter) for d in decoders]
    hooks += [d.register_forward_hook(leave) for d in decoders]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


if __name__ == "__main__":
    sys.exit(main())

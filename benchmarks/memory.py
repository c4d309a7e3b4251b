"""The memory that `--dry-run` foretells against what a GPU counts, by component.

    python benchmarks/memory.py              three configurations on one GPU of 80 GB
    python benchmarks/memory.py 0.6b-full    one of them

Each runs in a process of its own: the real trainer, built from flags with random weights in Qwen3
shapes, takes two GRPO steps of one full micro-batch; the second is measured. Weights, gradients and
optimizer are the bytes of the tensors themselves; activations are what the decoder's forward pass
leaves allocated; the rest of `torch.cuda.max_memory_allocated` is what passes. Writes
benchmarks/results/memory_estimate.json: per configuration estimate / measured peak.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_assets import described  # noqa: E402
from vime.cli import parse_config  # noqa: E402
from vime.config import Config  # noqa: E402
from vime.plan.shape import shape_of  # noqa: E402
from vime.plan.trainer_memory import trainer_memory  # noqa: E402
from vime.platform import current  # noqa: E402
from vime.types import Sample, Status  # noqa: E402

RESULT = ROOT / "benchmarks/results/memory_estimate.json"
TARGET = 0.10  # the estimated peak may be off by so much
GIB = 1 << 30
CASE_TIMEOUT_S = 420
PACKAGES = ("torch", "megatron-core")

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
DEFAULT = ("0.6b-none", "0.6b-full", "1.7b-selective")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(CASES)}")
    if args.measure:
        print(json.dumps(compare(CASES[args.measure])))
        return 0
    if not torch.cuda.is_available():
        print("benchmarks/memory.py needs a CUDA GPU; this machine has none.", file=sys.stderr)
        return 2
    figures = [figure(name, in_own_process(name)) for name in args.cases or DEFAULT]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"written to {args.output}")
    return 0


def in_own_process(name: str) -> dict[str, list[float]]:
    command = [sys.executable, __file__, "--measure", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=CASE_TIMEOUT_S)
    if done.returncode:
        raise SystemExit(f"{name} failed; its error is above")
    found = json.loads(done.stdout.splitlines()[-1])
    show(name, found)
    return found


def compare(case: Case) -> dict[str, list[float]]:
    """{component: [estimate, measured]} in bytes, the last one being the peak."""
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
    """Bytes by component in the second of two steps; 0 for what only CUDA counts, without it."""
    from vime.backends.megatron.checkpoints import load
    from vime.backends.megatron.trainer import MegatronTrainer
    from vime.data.batching import build_train_batch

    load.load_checkpoint = random_weights
    trainer = MegatronTrainer(cfg)
    batch = build_train_batch([samples(case)], cfg, 0)
    trainer.train(batch)  # makes the optimizer's state
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
    """In place of a checkpoint: the same memory, without a file of gigabytes."""
    torch.manual_seed(0)
    with torch.no_grad():
        for chunk in chunks:
            for name, p in chunk.named_parameters():
                p.fill_(1.0) if "norm" in name else p.normal_(0.0, 0.02)
    if optimizer is not None:
        optimizer.reload_model_params()
    return {}


def samples(case: Case) -> list[Sample]:
    """One group, its rewards 0 and 1 in turn; half of each sequence is response."""
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
    """Bytes of storages, each counted where it is met first."""
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
    """Bytes that each forward pass with gradients leaves allocated behind it."""
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


def show(name: str, found: dict[str, list[float]]) -> None:
    print(f"\n{name:<42}{'estimate':>10}{'measured':>10}{'ratio':>8}")
    for component, (estimate, measured) in found.items():
        ratio = f"{estimate / measured:8.3f}" if measured else f"{'-':>8}"
        print(f"  {component:<40}{estimate / GIB:>10.3f}{measured / GIB:>10.3f}{ratio}", flush=True)


def figure(name: str, found: dict[str, list[float]]) -> dict[str, Any]:
    estimate, measured = found["peak"]
    in_gib = {
        component: {"estimate": round(a / GIB, 3), "measured": round(b / GIB, 3)}
        for component, (a, b) in found.items()
    }
    return {
        "name": f"memory_estimate/{name}",
        "value": round(estimate / measured, 4),
        "unit": "1",
        "target": [1 - TARGET, 1 + TARGET],
        "peer": {
            "name": "torch.cuda.max_memory_allocated, GiB",
            "value": in_gib["peak"]["measured"],
        },
        "components_gib": in_gib,
        "device": torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), **versions()},
    }


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


if __name__ == "__main__":
    sys.exit(main())

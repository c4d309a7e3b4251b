"""A plan as text: batch arithmetic, layout and the memory estimate."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vime.config import Config
from vime.plan.engine_memory import engine_parts
from vime.plan.parts import GIB, Part, total
from vime.plan.shape import Shape, shape_of
from vime.plan.tokens import tokens_per_micro_batch
from vime.plan.trainer_memory import trainer_memory
from vime.platform import CUDA, Platform, current, has_cuda


def batch(cfg: Config) -> Iterator[str]:
    """Numbers of samples in a rollout, an optimizer step, a rank and a micro-batch."""
    b, steps, dp = cfg.batch, cfg.batch.steps_per_rollout, cfg.dp
    per_step = b.samples // steps
    yield (f"{b.prompts} prompts x {b.samples_per_prompt} samples = {b.samples} samples a rollout")
    noun = "step" if steps == 1 else "steps"
    yield f"{b.samples} samples / {steps} optimizer {noun} = {per_step} samples a step"
    yield f"{per_step} samples / {dp} data-parallel ranks = {per_step / dp:g} a rank and step"
    if b.dynamic:
        cap = tokens_per_micro_batch(cfg) * cfg.parallel.cp
        yield (
            f"a micro-batch is a pack of up to {cap:,} tokens (--max-tokens-per-gpu "
            f"{b.max_tokens_per_gpu} x CP {cfg.parallel.cp}); a longer sample is a pack alone"
        )
    else:
        share = -(-per_step // (dp * b.micro_batch_size))
        yield f"a micro-batch is {b.micro_batch_size} sequences: {share} a rank and step"
    if b.num_rollout is not None:
        yield (
            f"{b.num_rollout} rollouts x {steps} {noun} = {b.num_rollout * steps} "
            f"optimizer steps over {b.num_rollout * b.samples} samples"
        )
    else:
        yield f"{b.num_epoch} passes over the prompts, {b.prompts} prompts a rollout"


def layout(cfg: Config) -> Iterator[str]:
    """GPUs of the trainer and the engines."""
    cluster, p = cfg.cluster, cfg.parallel
    yield (
        f"trainer: {cluster.trainer_gpus} GPUs = TP {p.tp} x PP {p.pp} x CP {p.cp} "
        f"x DP {cfg.dp}; experts: EP {p.ep} x ETP {p.etp}"
    )
    where = "the trainer's, in turn" if cluster.colocate else "their own"
    engines = f"{cluster.num_engines} of {cluster.gpus_per_engine} GPUs each, {where}"
    yield "engines: " + ("none (debug)" if cfg.debug.no_engines else engines)
    yield f"together: {cluster.total_gpus} GPUs ({planned_for(cfg).device_type})"


def planned_for(cfg: Config) -> Platform:
    """CUDA when --plan-gpu-memory describes a GPU, otherwise the platform of this machine."""
    return CUDA if cfg.debug.plan_gpu_gib else current()


def gpu_gib(cfg: Config) -> float | None:
    """Memory of the planned GPU in GiB; None when neither a flag nor this machine has one."""
    if cfg.debug.plan_gpu_gib:
        return cfg.debug.plan_gpu_gib
    if not current().is_cuda or not has_cuda():  # a cluster's driver may have no GPU itself
        return None
    return torch.cuda.get_device_properties(0).total_memory / GIB


def memory(cfg: Config) -> Iterator[str]:
    """Memory of one trainer GPU and one engine GPU, part by part."""
    shape = shape_of(cfg)
    if shape is None:
        described = f"{cfg.model.hf_checkpoint}/config.json"
        yield f"unknown: {described} describes no architecture that vime trains"
        return
    dtype = planned_for(cfg).dtype(cfg.model.dtype)
    yield f"model: {shape.parameters:,} parameters, {dtype}".replace("torch.", "")
    if not cfg.debug.rollout_only:
        yield from _trainer(cfg, shape, dtype.itemsize)
    if not cfg.debug.no_engines:
        yield from _engine(cfg, shape, dtype.itemsize)
    if cfg.cluster.colocate and not (cfg.debug.rollout_only or cfg.debug.no_engines):
        yield from _sharing(cfg, shape, dtype.itemsize)
    yield "Not counted: CUDA context, collectives' buffers, fragmentation, kernels' workspaces."
    yield from _weight_copies(cfg, shape, dtype.itemsize)


def _trainer(cfg: Config, shape: Shape, num_bytes: int) -> Iterator[str]:
    needs = trainer_memory(cfg, shape, num_bytes)
    yield "trainer, all the time:"
    yield from map(_line, needs.held)
    yield f"trainer, on top in {needs.phase}:"
    yield from map(_line, needs.passing)
    yield _line(Part("peak", needs.peak, ""))
    have = gpu_gib(cfg)
    if have is None:
        return
    margin = cfg.cluster.train_memory_margin_bytes / GIB
    left = have - margin - needs.peak / GIB
    verdict = f"leaves {left:.1f} GiB" if left > 0 else f"lacks {-left:.1f} GiB"
    less = f"less --train-memory-margin-bytes ({margin:.1f} GiB)"
    yield f"  a GPU of {have:.1f} GiB, {less}, {verdict}"


def _engine(cfg: Config, shape: Shape, num_bytes: int) -> Iterator[str]:
    parts = engine_parts(cfg, shape, num_bytes)
    yield "engine:"
    yield from map(_line, [*parts, Part("total", total(parts), "")])
    share, have = cfg.engine.vllm_args.get("gpu_memory_utilization"), gpu_gib(cfg)
    if share is not None and have is not None:
        taken = float(share) * have
        cache = taken - parts[0].num_bytes / GIB
        yield (
            f"  --vllm-gpu-memory-utilization {share} takes {taken:.1f} GiB of {have:.1f}: "
            f"about {max(0.0, cache):.1f} GiB of KV cache, {_percent(cache, parts[1])} of full"
        )


def _sharing(cfg: Config, shape: Shape, num_bytes: int) -> Iterator[str]:
    held = trainer_memory(cfg, shape, num_bytes).held
    if cfg.cluster.offload_train:
        state = total([p for p in held if not p.name.endswith("gradients")]) / GIB
        yield (
            f"While engines generate, the trainer's weights and optimizer wait in host memory: "
            f"{state:.3f} GiB, pinned, for each GPU."
        )
    else:
        yield f"While engines generate, the trainer keeps {total(held) / GIB:.3f} GiB of each GPU."


def _weight_copies(cfg: Config, shape: Shape, num_bytes: int) -> Iterator[str]:
    size = shape.parameters * num_bytes / (cfg.parallel.tp * cfg.parallel.pp) / GIB
    needed = {
        "The reference": cfg.algorithm.needs_reference,
        "The teacher": cfg.algorithm.needs_teacher,
        "Each version of the engines' weights": cfg.algorithm.keep_old_actor,
    }
    for name in (name for name, is_needed in needed.items() if is_needed):
        yield f"{name} waits in host memory: {size:.3f} GiB for each trainer GPU."


def _percent(cache_gib: float, full: Part) -> str:
    return f"{max(0.0, min(1.0, cache_gib * GIB / max(full.num_bytes, 1))):.0%}"


def _line(part: Part) -> str:
    return f"  {part.name:<16}{part.num_bytes / GIB:>9.3f} GiB  {part.formula}".rstrip()

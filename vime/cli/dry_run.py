"""`--dry-run`: what a configuration means, as text."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vime.config import Config
from vime.config.fields import flags_in
from vime.config.view import SECTIONS, resolved
from vime.plan.memory import (
    Part,
    engine_parts,
    shape_of,
    tokens_per_micro_batch,
    total,
    trainer_memory,
)
from vime.plan.shape import Shape
from vime.platform import CUDA, Platform, current

GIB = 1 << 30


def report(cfg: Config) -> str:
    """The resolved configuration, the batch arithmetic, the layout and a memory estimate."""
    parts = {
        "Configuration": _configuration(cfg),
        "Batch": _batch(cfg),
        "Layout": _layout(cfg),
        "Memory per GPU, estimated": _memory(cfg),
    }
    texts = [title + "\n" + "\n".join(f"  {line}" for line in p) for title, p in parts.items()]
    return "\n\n".join(["Dry run: nothing was started.", *texts])


def _configuration(cfg: Config) -> Iterator[str]:
    values = resolved(cfg)
    for name in SECTIONS:
        yield f"[{name}]"
        section = getattr(cfg, name)
        for spec in flags_in(type(section)).values():
            if values[spec.dest] not in (None, {}):
                yield f"  {spec.name} {_shown(values[spec.dest])}"
    for title, prefix, extra in (
        ("MODEL_ARGS", "--", cfg.model.args),
        ("vLLM", "--vllm-", cfg.engine.vllm_args),
        ("vllm-router", "--router-", cfg.engine.router_args),
    ):
        if extra:
            yield f"[{title}]"
            for key, value in extra.items():
                yield f"  {prefix}{key.replace('_', '-')} {_shown(value)}".rstrip()
    if cfg.optimizer.critic_overrides:
        yield "[critic]"
        for name, value in cfg.optimizer.critic_overrides.items():
            yield f"  {flags_in(type(cfg.optimizer))[name].name} {_shown(value)}"


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _batch(cfg: Config) -> Iterator[str]:
    batch, steps, dp = cfg.batch, cfg.batch.steps_per_rollout, cfg.dp
    per_step = batch.samples // steps
    yield (
        f"{batch.prompts} prompts x {batch.samples_per_prompt} samples = {batch.samples} samples "
        "a rollout"
    )
    noun = "step" if steps == 1 else "steps"
    yield f"{batch.samples} samples / {steps} optimizer {noun} = {per_step} samples a step"
    yield f"{per_step} samples / {dp} data-parallel ranks = {per_step / dp:g} a rank and step"
    if batch.dynamic:
        cap = tokens_per_micro_batch(cfg) * cfg.parallel.cp
        yield (
            f"a micro-batch is a pack of up to {cap:,} tokens (--max-tokens-per-gpu "
            f"{batch.max_tokens_per_gpu} x CP {cfg.parallel.cp}); a longer sample is a pack alone"
        )
    else:
        share = -(-per_step // (dp * batch.micro_batch_size))
        yield f"a micro-batch is {batch.micro_batch_size} sequences: {share} a rank and step"
    if batch.num_rollout is not None:
        yield (
            f"{batch.num_rollout} rollouts x {steps} {noun} = {batch.num_rollout * steps} "
            f"optimizer steps over {batch.num_rollout * batch.samples} samples"
        )
    else:
        yield f"{batch.num_epoch} passes over the prompts, {batch.prompts} prompts a rollout"


def _layout(cfg: Config) -> Iterator[str]:
    cluster, layout = cfg.cluster, cfg.parallel
    yield (
        f"trainer: {cluster.trainer_gpus} GPUs = TP {layout.tp} x PP {layout.pp} x CP {layout.cp} "
        f"x DP {cfg.dp}; experts: EP {layout.ep} x ETP {layout.etp}"
    )
    where = "the trainer's, in turn" if cluster.colocate else "their own"
    engines = f"{cluster.num_engines} of {cluster.gpus_per_engine} GPUs each, {where}"
    yield "engines: " + ("none (debug)" if cfg.debug.no_engines else engines)
    yield f"together: {cluster.total_gpus} GPUs ({planned_for(cfg).device_type})"


def planned_for(cfg: Config) -> Platform:
    """GPUs where --plan-gpu-memory names some, else what this machine has."""
    return CUDA if cfg.debug.plan_gpu_gib else current()


def gpu_gib(cfg: Config) -> float | None:
    """Memory of the planned GPU; None on a machine without one, unless the flags say."""
    if cfg.debug.plan_gpu_gib:
        return cfg.debug.plan_gpu_gib
    return torch.cuda.get_device_properties(0).total_memory / GIB if current().is_cuda else None


def _memory(cfg: Config) -> Iterator[str]:
    shape = shape_of(cfg)
    if shape is None:
        yield f"unknown: {cfg.model.hf_checkpoint}/config.json does not name the usual sizes"
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
    copy = shape.parameters * dtype.itemsize / (cfg.parallel.tp * cfg.parallel.pp)
    if cfg.algorithm.keep_old_actor:
        yield f"Weights that engines were given wait there too, {copy / GIB:.3f} GiB a version."
    if cfg.algorithm.needs_reference:
        yield f"The reference waits in host memory: {copy / GIB:.3f} GiB for each trainer GPU."
    if cfg.algorithm.needs_teacher:
        yield f"The teacher waits in host memory: {copy / GIB:.3f} GiB for each trainer GPU."


def _trainer(cfg: Config, shape: Shape, num_bytes: int) -> Iterator[str]:
    memory = trainer_memory(cfg, shape, num_bytes)
    yield "trainer, all the time:"
    yield from map(_line, memory.held)
    yield f"trainer, on top in {memory.phase}:"
    yield from map(_line, memory.passing)
    yield _line(Part("peak", memory.peak, ""))
    have = gpu_gib(cfg)
    if have is None:
        return
    margin = cfg.cluster.train_memory_margin_bytes / GIB
    left = have - margin - memory.peak / GIB
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


def _percent(cache_gib: float, full: Part) -> str:
    return f"{max(0.0, min(1.0, cache_gib * GIB / max(full.num_bytes, 1))):.0%}"


def _line(part: Part) -> str:
    return f"  {part.name:<16}{part.num_bytes / GIB:>9.3f} GiB  {part.formula}".rstrip()

"""The flags to change when an engine's log says that GPU memory was too small."""

from __future__ import annotations

import math
import re

from vime.config import Config

# Lines that vLLM writes before it gives up, with the figures that they hold.
FREE_IS_LESS = re.compile(
    r"\(([\d.]+)/([\d.]+) GiB\) on startup is less than desired GPU memory utilization \(([\d.]+)"
)
NO_CACHE = "No available memory for the cache blocks"
ONE_REQUEST = re.compile(
    r"To serve at least one request .*?\(([\d.]+) GiB KV cache is needed, which is larger than the "
    r"available KV cache memory \(([\d.]+) GiB\)"
)
LONGEST = re.compile(r"estimated maximum model length is (\d+)")
OUT_OF_MEMORY = ("CUDA out of memory", "OutOfMemoryError")

SHARE = "--vllm-gpu-memory-utilization"
CACHE = "--vllm-kv-cache-memory-bytes"


def engine_remedy(cfg: Config, log: str) -> str | None:
    """The flags to change, with values; None if the log does not complain about memory."""
    given = cfg.engine.vllm_args
    size = given.get("kv_cache_memory_bytes")  # when given, vLLM ignores the share
    share = f"{SHARE} {given.get('gpu_memory_utilization', '(the default)')}"
    sized_by = share if size is None else f"{CACHE} {size}"
    if found := FREE_IS_LESS.search(log):
        free, total = float(found[1]), float(found[2])
        fits = math.floor(98 * free / total) / 100
        user = "the trainer keeps some" if cfg.cluster.colocate else "another program uses the rest"
        return (
            f"{free:.1f} of the GPU's {total:.1f} GiB are free ({user}), but the engine needs a "
            f"share of {found[3]}: {SHARE} {found[3]} -> {fits}"
        )
    if found := ONE_REQUEST.search(log):
        return _room_for_one_sequence(found, size, sized_by, LONGEST.search(log))
    if NO_CACHE in log:
        gpus = cfg.cluster.gpus_per_engine
        return (
            f"the weights leave no room for a KV cache: raise {share}, or "
            f"--rollout-num-gpus-per-engine {gpus} -> {2 * gpus}"
        )
    if any(word in log for word in OUT_OF_MEMORY):
        return (
            f"GPU memory ran out while the engine started: lower {sized_by}, --vllm-max-num-seqs "
            "or --vllm-max-num-batched-tokens"
        )
    return None


def _room_for_one_sequence(
    found: re.Match[str], size: object, sized_by: str, longest: re.Match[str] | None
) -> str:
    needed, there = float(found[1]), float(found[2])
    remedy = (
        f"one full sequence needs {needed - there:.2f} GiB more KV cache than there is: raise "
        f"{sized_by}"
    )
    if size is not None:
        # vLLM rounds the needed size to 0.01 GiB, so 0.01 GiB is added
        remedy += f" -> {math.ceil((needed + 0.01) * 1024) << 20}"
    return remedy + (f", or give --vllm-max-model-len {longest[1]}" if longest else "")

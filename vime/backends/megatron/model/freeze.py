"""The weights that train: --freeze-params-name-list and --only-train-params-name-list."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vime.backends.megatron.chunks import named_weights
from vime.backends.megatron.parallel import Ranks
from vime.config import Config
from vime.errors import ConfigError


def freeze_parameters(chunks: Sequence[nn.Module], args: dict[str, Any], cfg: Config) -> None:
    """Sets requires_grad by regular expressions, searched for in Megatron's names.

    In every layout, layers and experts are numbered as in the whole model. A collective; call it
    before the chunks are wrapped. Raises ConfigError on every rank if a pattern matches no weight
    of any rank, or if no weight is left to train.
    """
    o = cfg.optimizer
    patterns = o.freeze_names or o.train_names
    if not patterns:
        return
    flag = "--freeze-params-name-list" if o.freeze_names else "--only-train-params-name-list"
    names: list[str] = []
    training = False
    for name, tensor in named_weights(chunks, Ranks.current(), args):
        if not isinstance(tensor, nn.Parameter):
            continue
        if name == "output_layer.weight" and not args["untie_embeddings_and_output_weights"]:
            name = "embedding.word_embeddings.weight"  # the last pipeline stage's copy
        names.append(name)
        listed = any(re.search(pattern, name) for pattern in patterns)
        tensor.requires_grad_(listed != bool(o.freeze_names))
        training |= tensor.requires_grad
    _check_everywhere(flag, patterns, names, training)
    if cfg.parallel.recompute_granularity or cfg.parallel.ep > 1:
        for chunk in chunks:
            if hasattr(chunk, "embedding"):
                chunk.embedding.register_forward_hook(_ask_for_gradient)


def _check_everywhere(flag: str, patterns: Sequence[str], names: list[str], trains: bool) -> None:
    """Raises the same ConfigError on every rank. A collective."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (names, trains))
    everywhere = sorted({name for some, _ in found for name in some})
    unknown = [p for p in patterns if not any(re.search(p, name) for name in everywhere)]
    if unknown:
        raise ConfigError(
            f"{flag} {unknown[0]} matches no weight. Weights are called, for example, "
            f"{everywhere[0]} and {everywhere[-1]}."
        )
    if not any(trains for _, trains in found):
        raise ConfigError(f"{flag} {' '.join(patterns)} leaves no weight to train. Narrow it.")


def _ask_for_gradient(_: nn.Module, __: Any, embedded: Tensor) -> None:
    """Makes the embedding's output require a gradient, even if the embedding is frozen.

    Megatron's recomputation gives a layer no gradient unless its input requires one, so no layer of
    the stage would train. If one expert trains, every rank of its group must exchange gradients.
    Ranks whose own experts are frozen would skip that, and the other ranks would wait for them.
    """
    if torch.is_grad_enabled() and not embedded.requires_grad:
        embedded.requires_grad_()

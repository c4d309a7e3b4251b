"""Which weights train: --freeze-params-name-list and --only-train-params-name-list."""

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
    """Sets requires_grad from the regular expressions, searched for in Megatron's names.

    Layers and experts are numbered as in the whole model, whatever the layout. A collective; call
    it before the chunks are wrapped. Raises ConfigError on every rank when a pattern matches no
    weight of any rank, or when nothing is left to train.
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
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (names, training))
    everywhere = sorted({name for some, _ in found for name in some})
    unknown = [p for p in patterns if not any(re.search(p, name) for name in everywhere)]
    if unknown:
        raise ConfigError(
            f"{flag} {unknown[0]} matches no weight. Weights are called, for example, "
            f"{everywhere[0]} and {everywhere[-1]}."
        )
    if not any(training for _, training in found):
        raise ConfigError(f"{flag} {' '.join(patterns)} leaves no weight to train. Narrow it.")
    if cfg.parallel.recompute_granularity or cfg.parallel.ep > 1:
        for chunk in chunks:
            if hasattr(chunk, "embedding"):
                chunk.embedding.register_forward_hook(_ask_for_gradient)


def _ask_for_gradient(_: nn.Module, __: Any, embedded: Tensor) -> None:
    """Megatron's recomputation gives a layer no gradient unless its input has one.

    Behind a frozen embedding no input would, and no layer of the stage would train. And where one
    expert trains, every rank of its group must take part in the exchange of gradients, which ranks
    whose own experts are frozen would leave out: the others would wait for them.
    """
    if torch.is_grad_enabled() and not embedded.requires_grad:
        embedded.requires_grad_()

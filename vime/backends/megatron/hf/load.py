"""HF folder -> this rank's shards, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vime.backends.megatron.hf.family import Family, Weight
from vime.backends.megatron.hf.files import HFFiles, read_config
from vime.backends.megatron.hf.layout import Dims, hf_shapes, shard
from vime.backends.megatron.hf.ranks import Ranks
from vime.backends.megatron.hf.registry import family_for, model_args
from vime.config import Config
from vime.errors import CheckpointError


def load_hf_weights(chunks: Iterable[nn.Module], hf_dir: str | Path, cfg: Config) -> None:
    """Fills the chunks from a folder's safetensors, converted to each parameter's dtype.

    Strict: a missing, unexpected or wrongly shaped tensor raises CheckpointError naming file and
    tensor.
    Not a collective; every rank reads what it needs.
    """
    args = model_args(cfg)
    family = family_for(read_config(cfg.model.hf_checkpoint))
    files = HFFiles(hf_dir)
    weights = {w.mcore: w for w in family.weights(args)}
    _check_names(files, family, weights.values(), args)
    ranks, dims = Ranks.current(), Dims.of(args)
    with torch.no_grad():
        for name, parameter in named_weights(chunks, ranks, args):
            weight = weights.get(name) or _tied(name, weights)
            part = ranks.expert_tensor if weight.expert is not None else ranks.tensor
            wanted = hf_shapes(weight.kind, parameter.shape, part.size, dims)
            for hf_name, shape in zip(weight.hf, wanted, strict=True):
                if files.shape(hf_name) != shape:
                    raise CheckpointError(
                        f"{files.path(hf_name)}: tensor {hf_name} has shape "
                        f"{list(files.shape(hf_name))}, the model wants {list(shape)}. "
                        "The weights and config.json (or MODEL_ARGS) belong to different models."
                    )
            tensors = [files.read(n) for n in weight.hf]
            rows = parameter.shape[0]
            parameter.copy_(shard(weight.kind, tensors, part.rank, part.size, dims, rows))


def named_weights(
    chunks: Iterable[nn.Module], ranks: Ranks, args: dict[str, Any]
) -> list[tuple[str, Tensor]]:
    """[(name in the whole model, tensor)]: layers and experts are numbered across all ranks.

    Every parameter, and the router's bias, which is a buffer.
    """
    from vime.backends.megatron.model import unwrap

    local_experts = (args.get("num_experts") or 0) // ranks.expert.size
    first_expert = ranks.expert.rank * local_experts
    found = []
    for chunk in chunks:
        model = unwrap(chunk)
        layers = [layer.layer_number - 1 for layer in model.decoder.layers]
        biases = [(n, b) for n, b in model.named_buffers() if n.endswith("router.expert_bias")]
        for name, tensor in [*model.named_parameters(), *biases]:
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(layers[int(parts[2])])
            if "local_experts" in parts:
                at = parts.index("local_experts") + 1
                parts[at] = str(first_expert + int(parts[at]))
            found.append((".".join(parts), tensor))
    return found


def _tied(name: str, weights: dict[str, Weight]) -> Weight:
    """The last pipeline stage's own copy of tied embeddings."""
    assert name == "output_layer.weight", f"no rule for the weight {name}"
    return weights["embedding.word_embeddings.weight"]


def _check_names(
    files: HFFiles, family: Family, weights: Iterable[Weight], args: dict[str, Any]
) -> None:
    wanted = {name for w in weights for name in w.hf}
    missing = sorted(wanted - files.file_of.keys())
    if missing:
        raise CheckpointError(
            f"{files.folder}: no file holds tensor {missing[0]}"
            + (f" (and {len(missing) - 1} others)" if len(missing) > 1 else "")
            + f", which a {family.name} model of {args['num_layers']} layers needs. "
            "Download the folder again, or correct config.json."
        )
    extra = sorted(n for n in files.file_of.keys() - wanted if not family.is_ignored(n, args))
    if extra:
        raise CheckpointError(
            f"{files.path(extra[0])}: unexpected tensor {extra[0]}"
            + (f" (and {len(extra) - 1} others)" if len(extra) > 1 else "")
            + f"; a {family.name} model of {args['num_layers']} layers has none of that name. "
            "The weights and config.json belong to different models."
        )

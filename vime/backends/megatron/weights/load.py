"""Loads an HF folder into this rank's shards, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vime.backends.megatron.chunks import named_weights
from vime.backends.megatron.hf.family import Family, Weight
from vime.backends.megatron.hf.registry import family_of, model_args
from vime.backends.megatron.parallel import Place, Ranks
from vime.backends.megatron.weights.files import HFFiles
from vime.backends.megatron.weights.layout import Dims, hf_shapes, shard
from vime.config import Config
from vime.errors import CheckpointError


class HFWeights:
    """This rank's shard of any weight, read on demand from a folder's safetensors.

    A missing, unexpected or wrongly shaped tensor raises CheckpointError, which names file and
    tensor. Not a collective: every rank reads the tensors that it needs.
    """

    def __init__(self, hf_dir: str | Path, cfg: Config) -> None:
        args = model_args(cfg)
        family = family_of(cfg)
        self.files = HFFiles(hf_dir)
        self.weights = {w.mcore: w for w in family.weights(args)}
        _check_names(self.files, family, self.weights.values(), args)
        self.ranks, self.dims = Ranks.current(), Dims.of(args)

    def check(self, name: str, parameter: Tensor) -> tuple[Weight, Place]:
        """The weight with that Megatron name, and the ranks that share it.

        Raises CheckpointError if the files have other shapes.
        """
        weight = self.weights.get(name) or _tied(name, self.weights)
        part = self.ranks.expert_tensor if weight.expert is not None else self.ranks.tensor
        wanted = hf_shapes(weight.kind, parameter.shape, part.size, self.dims)
        for hf_name, shape in zip(weight.hf, wanted, strict=True):
            if self.files.shape(hf_name) != shape:
                raise CheckpointError(
                    f"{self.files.path(hf_name)}: tensor {hf_name} has shape "
                    f"{list(self.files.shape(hf_name))}, the model needs {list(shape)}. "
                    "The weights and config.json (or MODEL_ARGS) belong to different models."
                )
        return weight, part

    @torch.no_grad()
    def fill(self, name: str, parameter: Tensor) -> None:
        """Copies the weight with that Megatron name into `parameter`, converted to its dtype."""
        weight, part = self.check(name, parameter)
        tensors = [self.files.read(n) for n in weight.hf]
        rows = parameter.shape[0]
        parameter.copy_(shard(weight.kind, tensors, part.rank, part.size, self.dims, rows))


def load_hf_weights(chunks: Iterable[nn.Module], hf_dir: str | Path, cfg: Config) -> None:
    """Fills the chunks from a folder. Raises CheckpointError like `HFWeights`."""
    source = HFWeights(hf_dir, cfg)
    for name, parameter in named_weights(chunks, source.ranks, model_args(cfg)):
        source.fill(name, parameter)


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
            + f", which a {family.model_type} model of {args['num_layers']} layers needs. "
            "Download the folder again, or correct config.json."
        )
    extra = sorted(n for n in files.file_of.keys() - wanted if not family.is_ignored(n, args))
    if extra:
        raise CheckpointError(
            f"{files.path(extra[0])}: unexpected tensor {extra[0]}"
            + (f" (and {len(extra) - 1} others)" if len(extra) > 1 else "")
            + f"; a {family.model_type} model of {args['num_layers']} layers has no such tensor. "
            "The weights and config.json belong to different models."
        )

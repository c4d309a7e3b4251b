"""Converts checkpoints one weight at a time, so that memory holds one weight and not the model.

Allocated memory costs nothing until it is written, so a freshly built model costs nothing. Each
parameter is filled when its turn comes and freed afterwards. At the end all parameters are empty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vime.backends.megatron.checkpoints import torch_dist
from vime.backends.megatron.checkpoints.commit import check_manifest
from vime.backends.megatron.checkpoints.save import save_checkpoint
from vime.backends.megatron.checkpoints.start import Start
from vime.backends.megatron.checkpoints.stored_parts import StoredParts
from vime.backends.megatron.chunks import named_weights, unwrap
from vime.backends.megatron.hf.registry import model_args
from vime.backends.megatron.weights.load import HFWeights
from vime.config import Config


class Conversion:
    """Writes the weights of --hf-checkpoint as a Megatron checkpoint.

    Raises CheckpointError when the folder does not fit the model.
    """

    def __init__(self, cfg: Config, chunks: Sequence[nn.Module]) -> None:
        self.cfg, self.chunks = cfg, chunks
        self.source = HFWeights(cfg.model.hf_checkpoint, cfg)
        named = named_weights(chunks, self.source.ranks, model_args(cfg))
        for name, tensor in named:
            self.source.check(name, tensor)
        self.owners = {_memory_of(tensor): (name, tensor) for name, tensor in named}
        self.sizes = {m: t.untyped_storage().nbytes() for m, (_, t) in self.owners.items()}
        self.latest: int | None = None  # the only weight with content
        self.seen: set[int] = set()

    @property
    def num_bytes(self) -> int:
        """Size of this rank's weights. One of the ranks that share a weight writes it."""
        return sum(self.sizes.values())

    def write(self, folder: str | Path, done: Callable[[int], None]) -> Path:
        """Writes `folder`/release and returns it. A collective. Raises CheckpointError.

        done  called with the size in bytes of each weight when its turn comes
        """
        self.done = done
        target = save_checkpoint(self.cfg, folder, None, self.chunks, fill=self._fill)
        self._free_latest()
        return target

    def _fill(self, part: Tensor) -> None:
        """Called with a weight, or a part of it, right before it is written."""
        memory = _memory_of(part)
        if memory == self.latest or memory not in self.owners:
            return
        self._free_latest()
        name, whole = self.owners[memory]
        if memory in self.seen:  # other weights came between its parts
            whole.untyped_storage().resize_(self.sizes[memory])
        else:
            self.seen.add(memory)
            self.done(self.sizes[memory])
        self.source.fill(name, whole)
        self.source.files.unmap()
        self.latest = memory

    def _free_latest(self) -> None:
        if self.latest is not None:
            self.owners[self.latest][1].untyped_storage().resize_(0)
            self.latest = None


class StoredWeights:
    """Reads a Megatron checkpoint into the chunk, in one process.

    Raises CheckpointError when the checkpoint is damaged or does not fit the model.
    """

    def __init__(self, start: Start, chunk: nn.Module) -> None:
        torch_dist.check_files(start.folder)
        check_manifest(start.folder, with_data=start.resume)
        self.stored = StoredParts(start.folder)
        self.wanted = unwrap(chunk).sharded_state_dict()
        self.stored.check(self.wanted)
        self.tensors = dict([*unwrap(chunk).named_parameters(), *unwrap(chunk).named_buffers()])
        self.latest: Tensor | None = None  # the only weight with content

    @torch.no_grad()
    def read(self, name: str) -> None:
        """Fills the weight of that name and frees the previous one. Call it once for each name."""
        if self.latest is not None:
            self.latest.untyped_storage().resize_(0)
        self.latest = self.tensors[name]
        self.stored.fill(self.wanted[name])


def _memory_of(tensor: Tensor) -> int:
    """An identity of the memory: the same for every view of a tensor, also after it is freed."""
    return tensor.untyped_storage()._cdata

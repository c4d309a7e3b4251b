"""Checkpoints converted a weight at a time: memory holds one, not the model.

Memory that was allocated and never written costs nothing, so the parameters of a model that nobody
has touched serve: each is filled when its turn comes and freed after. They are empty in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vime.backends.megatron.checkpoints import checkpoint, torch_dist
from vime.backends.megatron.checkpoints.start import Start, check_manifest
from vime.backends.megatron.checkpoints.stored_parts import StoredParts
from vime.backends.megatron.chunks import named_weights, unwrap
from vime.backends.megatron.hf.load import HFWeights
from vime.backends.megatron.hf.registry import model_args
from vime.config import Config


class Conversion:
    """From --hf-checkpoint to a Megatron checkpoint, a weight at a time.

    Raises CheckpointError where the folder does not fit the model.
    """

    def __init__(self, cfg: Config, chunks: Sequence[nn.Module]) -> None:
        self.cfg, self.chunks = cfg, chunks
        self.source = HFWeights(cfg.model.hf_checkpoint, cfg)
        named = named_weights(chunks, self.source.ranks, model_args(cfg))
        for name, tensor in named:
            self.source.check(name, tensor)
        self.owners = {_memory_of(tensor): (name, tensor) for name, tensor in named}
        self.sizes = {m: t.untyped_storage().nbytes() for m, (_, t) in self.owners.items()}
        self.latest: int | None = None  # the one weight with content
        self.seen: set[int] = set()

    @property
    def num_bytes(self) -> int:
        """That this rank lays out; of what several ranks hold alike, one rank writes it."""
        return sum(self.sizes.values())

    def write(self, folder: str | Path, done: Callable[[int], None]) -> Path:
        """Writes `folder`/release and returns it. A collective. Raises CheckpointError.

        done  gets the bytes of each weight as its turn comes
        """
        self.done = done
        target = checkpoint.save_checkpoint(self.cfg, folder, None, self.chunks, fill=self._fill)
        self._free_latest()
        return target

    def _fill(self, part: Tensor) -> None:
        """Called with all or a part of a weight, right before it is written."""
        memory = _memory_of(part)
        if memory == self.latest or memory not in self.owners:
            return
        self._free_latest()
        name, whole = self.owners[memory]
        if memory in self.seen:  # its parts do not follow each other
            whole.untyped_storage().resize_(self.sizes[memory])
        else:
            self.seen.add(memory)
            self.done(self.sizes[memory])
        self.source.fill(name, whole)
        self.source.files.forget()
        self.latest = memory

    def _free_latest(self) -> None:
        if self.latest is not None:
            self.owners[self.latest][1].untyped_storage().resize_(0)
            self.latest = None


class StoredWeights:
    """A Megatron checkpoint's weights, read into the chunk a weight at a time, in one process.

    Raises CheckpointError where the checkpoint is damaged or does not fit the model.
    """

    def __init__(self, start: Start, chunk: nn.Module) -> None:
        torch_dist.check_files(start.folder)
        check_manifest(start)
        self.stored = StoredParts(start.folder)
        self.wanted = unwrap(chunk).sharded_state_dict()
        self.stored.check(self.wanted)
        self.tensors = dict([*unwrap(chunk).named_parameters(), *unwrap(chunk).named_buffers()])
        self.latest: Tensor | None = None  # the one weight with content

    @torch.no_grad()
    def read(self, name: str) -> None:
        """Fills the weight of that name, and frees the one before. Each once."""
        if self.latest is not None:
            self.latest.untyped_storage().resize_(0)
        self.latest = self.tensors[name]
        self.stored.fill(self.wanted[name])


def _memory_of(tensor: Tensor) -> int:
    """The same for every view of a tensor, and after it was freed."""
    return tensor.untyped_storage()._cdata

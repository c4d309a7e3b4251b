"""Reads single tensors, or parts of them, from a `torch_dist` directory.

Megatron's own loader reads everything that a rank holds at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from torch import Size, Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from vime.errors import CheckpointError


class StoredParts:
    """Reads parts of a directory's tensors into memory. Not a collective."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.reader = folder, dcp.FileSystemReader(folder)
        metadata = self.reader.read_metadata()
        self.reader.set_up_storage_reader(metadata, is_coordinator=True)
        self.tensors = {
            key: stored
            for key, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }
        self.chunks = {k: {c.offsets: c for c in t.chunks} for k, t in self.tensors.items()}

    def check(self, wanted: dict[str, Any]) -> None:
        """Raises CheckpointError unless every tensor of `wanted` is stored in its shape.

        wanted  a sharded state dict
        """
        for part in _parts(wanted):
            stored = self.tensors.get(part.key)
            if stored is None or not (
                part.allow_shape_mismatch or tuple(stored.size) == tuple(part.global_shape)
            ):
                raise CheckpointError(
                    f"{self.folder}: {part.key} is "
                    + ("missing" if stored is None else f"stored as {list(stored.size)}")
                    + f", the model needs {list(part.global_shape)}. The checkpoint belongs to "
                    "another model than config.json (or MODEL_ARGS) describes."
                )

    def fill(self, wanted: Any) -> None:
        """Reads one entry of a sharded state dict into the memory that the entry views."""
        for part in _parts({"entry": wanted}):
            assert part.data is not None
            shape = Size([1] * part.prepend_axis_num + list(part.local_shape))
            place = ChunkStorageMetadata(Size(part.global_offset), shape)
            stored, exact = self.tensors[part.key], self.chunks[part.key].get(place.offsets)
            if exact is not None and exact.sizes == shape:  # read no other expert
                stored = TensorStorageMetadata(stored.properties, stored.size, [exact])
            items = create_read_items_for_chunk_list(part.key, stored, [place])
            self.reader.read_data(LoadPlan(items), _Into(part.data.view(shape))).wait()


def _parts(wanted: dict[str, Any]) -> Iterator[ShardedTensor]:
    """The stored tensors of a sharded state dict, as views of the state dict's memory.

    A weight may have several: the weight of a gated layer is stored as two tensors.
    """
    plain, _, _ = load_preprocess(wanted)
    return (part for part in nested_values(plain) if isinstance(part, ShardedTensor))


class _Into(dcp.DefaultLoadPlanner):
    """Copies everything that is read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        found = self.target
        for axis, start in enumerate(read_item.dest_offsets):
            found = found.narrow(axis, start, read_item.lengths[axis])
        return found

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass

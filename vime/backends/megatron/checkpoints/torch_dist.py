"""One `torch_dist` directory: written by this process, checked before it is read."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from vime.backends.megatron.checkpoints.commit import DAMAGED
from vime.errors import CheckpointError


class InProcessSave(TorchDistSaveShardedStrategy):
    """Megatron's format, written by torch's own writer.

    Megatron's writer forks a process per file and keeps a spawned manager. Neither works in Ray
    actors or in scripts without a `__main__` guard. Both writers produce the same bytes.

    staged  copy the tensors to memory; the caller then calls `write(process_group=...)`
    fill    called with each tensor right before it is written
    """

    def __init__(
        self, *, staged: bool = False, fill: Callable[[Tensor], None] | None = None
    ) -> None:
        super().__init__("torch_dist", 1)
        self.staged, self.fill = staged, fill
        self.write: Callable[..., Any] | None = None

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        if self.staged:
            for part in (part for parts in by_key.values() for part in parts):
                if isinstance(part, ShardedTensor):
                    part.data = part.data.detach().to("cpu", copy=True)
        self.write = partial(
            dcp.save,
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=dcp.FileSystemWriter(
                checkpoint_dir,
                thread_count=1,
                **({} if self.fill is None else {"per_thread_copy_ahead": 0}),
            ),
            planner=_Planner(
                self.fill,
                dedup_replicated_tensors=False,
                flatten_state_dict=False,
                flatten_sharded_tensors=False,
            ),
        )
        if not self.staged:
            self.write()


class _Planner(MCoreSavePlanner):
    """Calls `fill` with each tensor right before it is written."""

    def __init__(self, fill: Callable[[Tensor], None] | None, **options: Any) -> None:
        super().__init__(**options)
        self.fill = fill

    def resolve_data(self, write_item: WriteItem) -> Any:
        if self.fill is not None and write_item.type is not WriteItemType.BYTE_IO:
            self.fill(self.lookup_object(write_item.index))
        return super().resolve_data(write_item)


def save(state: dict[str, Any], folder: Path, fill: Callable[[Tensor], None] | None = None) -> None:
    """Writes a sharded state dict. A collective.

    fill  called with each tensor right before it is written; None: the tensors are filled already
    """
    with _quiet():
        dist_checkpointing.save(state, str(folder), InProcessSave(fill=fill))


def stage(state: dict[str, Any], folder: Path) -> Callable[[Any], None]:
    """Copies the state to memory. Returns `write(group)`, which writes it. Both are collectives."""
    strategy = InProcessSave(staged=True)
    with _quiet():
        dist_checkpointing.save(state, str(folder), strategy)

    def write(group: Any) -> None:
        assert strategy.write is not None
        with _named_failures():
            strategy.write(process_group=group)

    return write


def load(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Reads the entries of `wanted`, a sharded state dict, and the common state. A collective."""
    with _quiet():
        return dist_checkpointing.load(wanted, str(folder))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences torch's notices that megatron-core uses ShardedTensor and `load_state_dict`."""
    with warnings.catch_warnings(), _named_failures():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="Detected an existing checkpoint")
        yield


@contextmanager
def _named_failures() -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:  # a BaseException with the traceback of every rank
        rank, (cause, _) = next(iter(error.failures.items()))
        raise RuntimeError(f"rank {rank}: {cause}") from cause


def check_files(folder: Path, remedy: str = DAMAGED) -> None:
    """Compares the directory's files with its own metadata.

    Raises CheckpointError naming the first file that is missing or too short, and the remedy.
    """
    gone = "is missing: the checkpoint is incomplete."
    for name in ("metadata.json", ".metadata"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} {gone} {remedy}")
    try:
        metadata = dcp.FileSystemReader(folder).read_metadata()
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{folder / '.metadata'} is damaged ({error!r}). {remedy}") from None
    in_shards = any(k.startswith("common_state/") for k in metadata.state_dict_metadata)  # 0.19
    if not in_shards and not (folder / "common.pt").is_file():
        raise CheckpointError(f"{folder / 'common.pt'} {gone} {remedy}")
    stored = metadata.storage_data
    ends: dict[str, int] = {}
    for info in stored.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} {gone} {remedy}")
        if path.stat().st_size < end:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes of {end}: it was cut off. {remedy}"
            )

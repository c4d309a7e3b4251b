"""Writes a safetensors file tensor by tensor, in any order, so that memory holds one tensor."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Set
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vime.errors import CheckpointError
from vime.files import commit, partial_path

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_METADATA = "__metadata__"


class TensorFile:
    """A file with the tensors of the file `like` whose names are in `names`.

    Order, dtypes, shapes and metadata come from `like`. If `names` has all tensors of `like`, the
    header has the same bytes. `close` gives the file its final name.
    """

    def __init__(self, path: Path, like: Path, names: Set[str]) -> None:
        self.path, self.like = path, like
        self.partial = partial_path(path)
        header, self.entries = _header(like, names)
        self.missing = set(self.entries)
        self.start = 8 + len(header)
        self.file = self.partial.open("wb")
        self.file.write(len(header).to_bytes(8, "little") + header)

    def add(self, name: str, tensor: Tensor) -> int:
        """Writes one tensor, converted to the file's dtype. Returns its number of bytes."""
        entry = self.entries[name]
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None or list(tensor.shape) != entry["shape"]:
            raise CheckpointError(
                f"tensor {name} is {list(tensor.shape)} in {tensor.dtype}, but {self.like} has "
                f"{entry['shape']} in {entry['dtype']}. Give the folder of the model that was "
                "trained, in bfloat16, float16 or float32."
            )
        data = tensor.detach().to("cpu", dtype).contiguous()
        self.file.seek(self.start + entry["data_offsets"][0])
        if data.nbytes:  # numpy would keep torch from freeing the storage
            self.file.write((ctypes.c_char * data.nbytes).from_address(data.data_ptr()))
        self.missing.discard(name)
        return data.nbytes

    def close(self) -> None:
        """Gives the complete file its name."""
        assert not self.missing, f"{self.path} lacks {sorted(self.missing)[:3]}"
        self.file.close()
        commit(self.partial, self.path)

    def abandon(self) -> None:
        """Deletes the incomplete file."""
        with suppress(OSError):  # the rest of the buffer may not fit the disk either
            self.file.close()
        self.partial.unlink(missing_ok=True)


def _header(like: Path, names: Set[str]) -> tuple[bytes, dict[str, Any]]:
    """(header without its length, {tensor: dtype, shape, data_offsets}) of the new file."""
    with like.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    entries: dict[str, Any] = json.loads(header)
    metadata = entries.pop(_METADATA, None)
    if entries.keys() <= names:
        return header, entries
    kept, end = {}, 0
    for name in sorted(entries.keys() & names, key=lambda n: entries[n]["data_offsets"]):
        first, last = entries[name]["data_offsets"]
        kept[name] = entries[name] | {"data_offsets": [end, end + last - first]}
        end += last - first
    head = {} if metadata is None else {_METADATA: metadata}
    text = json.dumps(head | kept, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), kept

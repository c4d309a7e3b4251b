"""The safetensors files of an HF folder, read one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from vime.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"


class HFFiles:
    """The tensors of an HF folder by name, read one at a time.

    framework  for safetensors: "pt", or "np", which gives names and shapes without importing torch
    """

    def __init__(self, hf_dir: str | Path, framework: str = "pt") -> None:
        self.folder, self._framework = Path(hf_dir), framework
        self._open: dict[str, Any] = {}
        self.file_of: dict[str, str] = {}  # {tensor: file}, in the files' own order
        index = self.folder / INDEX
        if index.is_file():
            try:
                listed: dict[str, str] = json.loads(index.read_text())["weight_map"]
            except (json.JSONDecodeError, KeyError) as error:
                raise CheckpointError(f"{index} is damaged ({error!r}).") from None
            names = list(dict.fromkeys(listed.values()))
        else:
            listed, names = {}, sorted(p.name for p in self.folder.glob("*.safetensors"))
        if not names:
            raise CheckpointError(
                f"{self.folder} holds no *.safetensors file. Download the weights too."
            )
        for name in names:
            self.file_of |= dict.fromkeys(self._file(name).keys(), name)
        for tensor, name in listed.items():
            if self.file_of.get(tensor) != name:
                raise CheckpointError(
                    f"{self.folder / name} lacks tensor {tensor}, which {INDEX} lists. "
                    "Download the file again."
                )

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self.folder / name
            try:
                self._open[name] = safe_open(path, framework=self._framework)
            except FileNotFoundError:
                raise CheckpointError(
                    f"{path} is missing, but {INDEX} names it. Download it again."
                ) from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path} cannot be read ({error}). Download it again."
                ) from None
        return self._open[name]

    def path(self, tensor: str) -> Path:
        return self.folder / self.file_of[tensor]

    def shape(self, tensor: str) -> tuple[int, ...]:
        return tuple(self._file(self.file_of[tensor]).get_slice(tensor).get_shape())

    def dtype(self, tensor: str) -> str:
        """The tensor's dtype as safetensors spells it: "F32", "BF16", ..."""
        return self._file(self.file_of[tensor]).get_slice(tensor).get_dtype()

    def metadata(self, name: str) -> dict[str, str] | None:
        return self._file(name).metadata()

    def unmap(self) -> None:
        """Unmaps the files, so that they no longer count as this process's memory."""
        self._open.clear()

    def read(self, tensor: str) -> Tensor:
        return self._file(self.file_of[tensor]).get_tensor(tensor)

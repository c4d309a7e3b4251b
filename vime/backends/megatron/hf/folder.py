"""Writes an HF folder whose layout is that of the folder the model came from."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vime.backends.megatron.hf.export import export_hf
from vime.backends.megatron.hf.files import INDEX, HFFiles
from vime.config import Config
from vime.errors import CheckpointError

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_ONE_FILE = "model.safetensors"


def save_hf(
    chunks: Iterable[nn.Module],
    cfg: Config,
    folder: str | Path,
    done: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Writes the weights, and --hf-checkpoint's config, tokenizer and other small files.

    A collective. Names, dtypes, files and metadata are those of --hf-checkpoint, so weights that
    did not change come back with the same bytes. `done` gets each tensor's bytes. Rank 0 writes;
    config.json appears last. Raises CheckpointError on every rank when the disk refuses.
    """
    writer = problem = None
    for step in _steps(chunks, cfg):
        if dist.get_rank() == 0 and problem is None:
            try:
                if writer is None:
                    writer = _Writer(Path(cfg.model.hf_checkpoint), Path(folder))
                writer.finish() if step is None else writer.add(*step)
            except (OSError, SafetensorError) as error:
                problem = (
                    f"{folder}: cannot write the HF folder ({error}). It is incomplete. "
                    "Free the disk or choose another folder."
                )
            except CheckpointError as error:
                problem = f"{folder}: cannot write the HF folder: {error}"
        if step is not None:
            done(step[1].nbytes)
    verdict = [problem]
    dist.broadcast_object_list(verdict, src=0)
    if verdict[0]:
        raise CheckpointError(verdict[0])


def _steps(chunks: Iterable[nn.Module], cfg: Config) -> Iterator[tuple[str, Tensor] | None]:
    """The tensors, then None for the end."""
    yield from export_hf(chunks, cfg)
    yield None


class _Writer:
    """Collects tensors until a file is complete, then writes it under its final name."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target = source, target
        self.has_weights = any(source.glob("*.safetensors"))
        self.files = HFFiles(source) if self.has_weights else None
        self.waiting: dict[str, dict[str, Tensor]] = {}
        self.written: dict[str, str] = {}
        self.num_bytes = self.num_parameters = 0
        if source.resolve() == target.resolve():
            raise CheckpointError(f"{target} is --hf-checkpoint itself; choose another folder.")
        target.mkdir(parents=True, exist_ok=True)
        (target / "config.json").unlink(missing_ok=True)  # the folder is incomplete from here on

    def add(self, name: str, tensor: Tensor) -> None:
        known = self.files is not None and name in self.files.file_of
        file = self.files.file_of[name] if known else _ONE_FILE
        dtype = _DTYPES.get(self.files.dtype(name), tensor.dtype) if known else tensor.dtype
        held = self.waiting.setdefault(file, {})
        held[name] = tensor.detach().to("cpu", dtype, copy=True)
        if known and len(held) == self._size(file):
            self._write(file)

    def finish(self) -> None:
        for file in list(self.waiting):
            self._write(file)
        if len(set(self.written.values())) > 1:
            self._write_index()
        for path in sorted(self.source.iterdir(), key=lambda p: p.name == "config.json"):
            weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth") or path.name == INDEX
            if path.is_file() and not weights:
                shutil.copyfile(path, self.target / path.name)

    def _size(self, file: str) -> int:
        assert self.files is not None
        return sum(f == file for f in self.files.file_of.values())

    def _write(self, file: str) -> None:
        tensors = self.waiting.pop(file)
        metadata = (self.files.metadata(file) if self.files else None) or {"format": "pt"}
        partial = self.target / f".{file}.partial"
        try:
            save_file(tensors, partial, metadata=metadata)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        os.replace(partial, self.target / file)
        self.written |= dict.fromkeys(tensors, file)
        self.num_bytes += sum(t.nbytes for t in tensors.values())
        self.num_parameters += sum(t.numel() for t in tensors.values())

    def _write_index(self) -> None:
        index = {
            "metadata": {
                "total_parameters": self.num_parameters,
                "total_size": self.num_bytes,
            },
            "weight_map": dict(sorted(self.written.items())),
        }
        (self.target / INDEX).write_text(json.dumps(index, indent=2) + "\n")

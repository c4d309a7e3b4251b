"""Writes an HF folder with the layout of the folder that the model came from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Set
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vime.backends.megatron.hf.registry import family_of, model_args
from vime.backends.megatron.weights.export import export_hf
from vime.backends.megatron.weights.files import INDEX, HFFiles
from vime.backends.megatron.weights.tensor_file import TensorFile
from vime.config import Config
from vime.errors import CheckpointError
from vime.files import write_text, written_whole

_ONE_FILE = "model.safetensors"


def save_hf(
    chunks: Iterable[nn.Module],
    cfg: Config,
    folder: str | Path,
    done: Callable[[int], None] = lambda num_bytes: None,
    read: Callable[[str], None] | None = None,
) -> None:
    """Writes the weights, and --hf-checkpoint's config, tokenizer and other small files.

    A collective. Names, dtypes, files and metadata are the same as in --hf-checkpoint, so unchanged
    weights are written with the same bytes. Rank 0 writes each tensor as it arrives; config.json
    appears last. If writing fails, every rank raises CheckpointError.

    done  gets the number of bytes of each tensor
    read  see `export_hf`
    """
    writer = _Writer(Path(cfg.model.hf_checkpoint), Path(folder), _names(cfg))
    attempt = writer.attempt if dist.get_rank() == 0 else lambda *_: None
    try:
        attempt(writer.start)
        for name, tensor in export_hf(chunks, cfg, read):
            attempt(writer.add, name, tensor)
            done(tensor.nbytes)
        attempt(writer.finish)
    finally:
        writer.abandon()
    problem = [writer.problem]
    dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise CheckpointError(problem[0])


def _names(cfg: Config) -> set[str]:
    """The names of all tensors of an export."""
    return {name for weight in family_of(cfg).weights(model_args(cfg)) for name in weight.hf}


class _Writer:
    """Writes tensors as they arrive. A file gets its final name once it is complete."""

    def __init__(self, source: Path, target: Path, names: Set[str]) -> None:
        self.source, self.target, self.names = source, target, names
        self.files: HFFiles | None = None  # of the source: their layout is copied
        self.held: dict[str, Tensor] = {}  # all tensors, if the source has no weights
        self.open: dict[str, TensorFile] = {}
        self.written: dict[str, str] = {}
        self.num_bytes = self.num_parameters = 0
        self.problem: str | None = None

    def attempt(self, step: Callable[..., None], *args: Any) -> None:
        """Takes a step, unless an earlier one failed.

        An error is kept as `problem`: the other ranks would wait for a rank that raised it.
        """
        if self.problem is not None:
            return
        try:
            step(*args)
        except (OSError, SafetensorError) as error:
            self.problem = (
                f"{self.target}: cannot write the HF folder ({error}). The folder is incomplete. "
                "Free the disk or choose another folder."
            )
        except CheckpointError as error:
            self.problem = f"{self.target}: cannot write the HF folder: {error}"
        except Exception as error:
            self.problem = (
                f"{self.target}: cannot write the HF folder: {type(error).__name__}: {error}"
            )

    def start(self) -> None:
        if self.source.resolve() == self.target.resolve():
            raise CheckpointError(
                f"{self.target} is --hf-checkpoint itself; choose another folder."
            )
        if any(self.source.glob("*.safetensors")):
            self.files = HFFiles(self.source)
        self.target.mkdir(parents=True, exist_ok=True)
        # without it the folder counts as incomplete
        (self.target / "config.json").unlink(missing_ok=True)
        for abandoned in self.target.glob(".*.partial"):  # left by a killed export
            abandoned.unlink()

    def add(self, name: str, tensor: Tensor) -> None:
        self.num_parameters += tensor.numel()
        if self.files is None:
            self.held[name] = tensor.detach().to("cpu", copy=True)
            return
        if name not in self.files.file_of:
            raise CheckpointError(
                f"{self.source} holds no tensor {name}: it belongs to another model."
            )
        file = self.files.file_of[name]
        if file not in self.open:
            self.open[file] = TensorFile(self.target / file, self.source / file, self.names)
        self.num_bytes += self.open[file].add(name, tensor)
        self.written[name] = file
        if not self.open[file].missing:
            self.open.pop(file).close()

    def finish(self) -> None:
        if self.held:
            self._write_held()
        assert not self.open, f"incomplete: {sorted(self.open)}"
        if len(set(self.written.values())) > 1:
            self._write_index()
        for path in sorted(self.source.iterdir(), key=lambda p: p.name == "config.json"):
            weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth") or path.name == INDEX
            if path.is_file() and not weights:
                with written_whole(self.target / path.name) as partial:
                    shutil.copyfile(path, partial)

    def abandon(self) -> None:
        """Deletes incomplete files."""
        for file in self.open.values():
            file.abandon()

    def _write_held(self) -> None:
        with written_whole(self.target / _ONE_FILE) as partial:
            save_file(self.held, partial, metadata={"format": "pt"})

    def _write_index(self) -> None:
        index = {
            "metadata": {
                "total_parameters": self.num_parameters,
                "total_size": self.num_bytes,
            },
            "weight_map": dict(sorted(self.written.items())),
        }
        write_text(self.target / INDEX, json.dumps(index, indent=2) + "\n")

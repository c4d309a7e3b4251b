"""Weights between HF folders and shards: splitting, joining, and damaged folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from tests.unit.qwen3_4b import QWEN3_4B, config_of
from vime.backends.megatron.hf.family import Kind
from vime.backends.megatron.hf.registry import family_for, family_of, model_args
from vime.backends.megatron.weights import folder
from vime.backends.megatron.weights.files import HFFiles
from vime.backends.megatron.weights.layout import Dims, hf_shapes, shard, unshard
from vime.backends.megatron.weights.load import load_hf_weights
from vime.errors import CheckpointError

DIMS = Dims(heads=4, groups=2, channels=3, vocab=7)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("kind", Kind)
def test_sharding_then_joining_gives_the_tensors_back(kind: Kind, num_ranks: int) -> None:
    rows = {Kind.VOCAB: 4, Kind.QKV: 24 // num_ranks}.get(kind, 8) if num_ranks > 1 else 7
    rows = {Kind.QKV: 24 // num_ranks, Kind.GLU: 8}.get(kind, rows)
    shapes = hf_shapes(kind, (rows, 5), num_ranks, DIMS)
    full = [torch.randn(shape) for shape in shapes]
    shards = [shard(kind, full, rank, num_ranks, DIMS, rows) for rank in range(num_ranks)]
    assert all(s.shape == (rows, 5) for s in shards)
    for tensor, back in zip(full, unshard(kind, shards, DIMS), strict=True):
        assert torch.equal(tensor, back)


def test_query_key_value_are_interleaved_by_group() -> None:
    dims = Dims(heads=4, groups=2, channels=1, vocab=0)
    q, k, v = torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6]), torch.tensor([7, 8])
    merged = shard(Kind.QKV, [q, k, v], 0, 1, dims, 8)
    assert merged.tolist() == [1, 2, 5, 7, 3, 4, 6, 8]


def test_padded_vocabulary_rows_are_zero_and_cut_off_again() -> None:
    table = torch.ones(7, 2)
    last = shard(Kind.VOCAB, [table], 1, 2, DIMS, 4)
    assert last.tolist() == [[1, 1], [1, 1], [1, 1], [0, 0]]
    assert len(unshard(Kind.VOCAB, [table[:4], last], DIMS)[0]) == 7


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    small = QWEN3_4B | {"num_hidden_layers": 1, "hidden_size": 4, "vocab_size": 8}
    cfg = config_of(tmp_path, small)
    family = family_for(small)
    names = [n for w in family.weights(model_args(cfg)) for n in w.hf]
    tensors = {n: torch.zeros(1) for n in names}

    def failure(found: dict[str, torch.Tensor]) -> str:
        save_file(found, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError) as error:
            load_hf_weights([], tmp_path, cfg)
        return str(error.value)

    assert names[3] in failure({n: t for n, t in tensors.items() if n != names[3]})
    assert "model.safetensors: unexpected tensor extra" in failure(
        tensors | {"extra": torch.zeros(1)}
    )
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_hf_weights([], tmp_path, cfg)


def test_a_file_that_is_cut_off_missing_or_lacks_a_tensor_is_named(tmp_path: Path) -> None:
    first, second = (tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    save_file({"a": torch.zeros(64)}, first)
    save_file({"b": torch.zeros(64)}, second)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": first.name, "b": second.name}}))
    assert HFFiles(tmp_path).file_of == {"a": first.name, "b": second.name}

    def refused() -> str:
        with pytest.raises(CheckpointError) as error:
            HFFiles(tmp_path)
        return str(error.value)

    whole = second.read_bytes()
    second.write_bytes(whole[:-1])
    assert f"{second} cannot be read" in refused()
    assert "Download it again" in refused()
    second.unlink()
    assert f"{second} is missing, but model.safetensors.index.json names it" in refused()
    save_file({"c": torch.zeros(64)}, second)
    assert f"{second} lacks tensor b, which model.safetensors.index.json lists" in refused()
    index.write_text("{}")
    assert f"{index} is damaged" in refused()


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_an_export_has_the_original_bytes_or_says_why_it_is_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "hf"
    cfg = config_of(source, QWEN3_4B | {"num_hidden_layers": 1})
    names = [n for w in family_of(cfg).weights(model_args(cfg)) for n in w.hf]
    tensors = {name: torch.full((4,), float(i)) for i, name in enumerate(names)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    taken: list[str] = []

    def export(*_: object) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors.items():
            taken.append(name)
            yield name, tensor

    monkeypatch.setattr(folder, "export_hf", export)
    sizes: list[int] = []
    folder.save_hf([], cfg, tmp_path / "out", sizes.append)
    assert sizes == [16] * len(tensors)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()

    def failure(target: Path) -> str:
        taken.clear()
        with pytest.raises(CheckpointError) as error:
            folder.save_hf([], cfg, target)
        assert taken == list(tensors), "the export is a collective, so it goes on to its end"
        return str(error.value)

    assert "is --hf-checkpoint itself" in failure(source)
    assert (source / "config.json").exists()
    (tmp_path / "file").touch()
    assert "Free the disk or choose another folder" in failure(tmp_path / "file" / "out")
    tensors[names[-1]] = torch.zeros(5)
    assert f"tensor {names[-1]} is [5]" in failure(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "model.safetensors"]
    del tensors[names[-1]]
    tensors["another"] = torch.zeros(4)
    assert "no tensor another: it belongs to another model" in failure(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []

    def fail(*_: object) -> None:
        raise ValueError("a tensor of an odd type")

    monkeypatch.setattr(folder.TensorFile, "add", fail)
    assert "ValueError: a tensor of an odd type" in failure(tmp_path / "odd")

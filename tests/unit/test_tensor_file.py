"""A safetensors file, written tensor by tensor with the layout of another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vime.backends.megatron.weights.tensor_file import TensorFile
from vime.errors import CheckpointError

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a": torch.arange(5).to(torch.bfloat16),
    "nothing": torch.empty(0, 4),
    "one": torch.tensor(7.0),
}


@pytest.fixture
def like(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "like.safetensors", metadata={"format": "pt"})
    return tmp_path / "like.safetensors"


def test_all_tensors_in_any_order_make_the_same_bytes(like: Path, tmp_path: Path) -> None:
    path = tmp_path / "new.safetensors"
    file = TensorFile(path, like, TENSORS.keys() | {"of another file"})
    for name in ("one", "a", "nothing", "b"):
        assert not path.exists()
        assert file.add(name, TENSORS[name].float()) == TENSORS[name].nbytes
    assert not file.missing
    file.close()
    assert path.read_bytes() == like.read_bytes()


def test_a_subset_of_the_tensors_makes_a_smaller_file(like: Path, tmp_path: Path) -> None:
    path = tmp_path / "new.safetensors"
    file = TensorFile(path, like, {"a", "one"})
    for name in ("a", "one"):
        file.add(name, TENSORS[name].t() if name == "one" else TENSORS[name])
    file.close()
    found = load_file(path)
    assert found.keys() == {"a", "one"}
    assert all(torch.equal(found[name], TENSORS[name]) for name in found)
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_a_view_that_is_not_contiguous_is_written_in_order(like: Path, tmp_path: Path) -> None:
    file = TensorFile(tmp_path / "new.safetensors", like, {"b"})
    file.add("b", TENSORS["b"].t().contiguous().t())
    file.close()
    assert torch.equal(load_file(tmp_path / "new.safetensors")["b"], TENSORS["b"])


def test_another_shape_is_refused_and_an_abandoned_file_is_gone(like: Path, tmp_path: Path) -> None:
    file = TensorFile(tmp_path / "new.safetensors", like, TENSORS.keys())
    with pytest.raises(
        CheckpointError, match=r"tensor b is \[3, 2\].*like.safetensors has \[2, 3\]"
    ):
        file.add("b", TENSORS["b"].t())
    file.abandon()
    assert [p.name for p in tmp_path.iterdir()] == ["like.safetensors"]

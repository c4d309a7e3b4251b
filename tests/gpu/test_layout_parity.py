"""Two steps of GRPO in every layout of two GPUs, over NCCL, against Hugging Face autograd.

What tests/cpu/test_gradient_parity.py checks over gloo, in float32 with the GPU's own kernels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import free_port, run_ranks
from test_gradient_parity import LAYOUTS, expected, train, worst, write_models

__all__ = ["expected"]  # a fixture
NUM_GPUS = torch.cuda.device_count()
RTOL_LOSS, RTOL = 1e-5, 1e-4  # of the largest value; sums of GPUs come in another order each time


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parity")
    return write_models(root, hidden_size=256, intermediate_size=320, head_dim=64)


@pytest.fixture(scope="module")
def found(folder: Path) -> list[list[dict[str, Any]]]:
    """By rank and case."""
    if NUM_GPUS < 2:
        pytest.skip("needs two GPUs")
    ports = [free_port() for _ in LAYOUTS[2]]
    return run_ranks(train, 2, timeout_s=400, folder=folder, cases=LAYOUTS[2], ports=ports)


@pytest.mark.parametrize("number", range(len(LAYOUTS[2])), ids=[str(c) for c in LAYOUTS[2]])
def test_two_gpus_agree_with_plain_autograd(
    number: int, found: list[list[dict[str, Any]]], expected: dict[str, Any]
) -> None:
    for rank in found:
        mine = rank[number]
        loss = mine["metrics"]["train/loss"] / expected["loss"] - 1
        errors = {"weights": worst(mine["weights"], expected["weights"])}
        if mine["gradients"] is not None:
            errors["gradients"] = worst(mine["gradients"], expected["gradients"])
        print(f"loss {loss:.1e}", *(f"{name} {e:.1e}" for name, e in errors.items()))
        assert abs(loss) < RTOL_LOSS
        assert max(errors.values()) < RTOL

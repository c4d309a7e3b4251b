"""Two steps of GRPO in every layout of two GPUs, over NCCL, against Hugging Face autograd.

What tests/cpu/test_gradient_parity.py checks over gloo, in float32 with the GPU's own kernels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import free_port, run_ranks
from test_gradient_parity import LAYOUTS, Case, expected, train, worst, write_models

__all__ = ["expected"]  # a fixture
NUM_GPUS = torch.cuda.device_count()
RTOL_LOSS, RTOL = 1e-5, 1e-4  # of the largest value; sums of GPUs come in another order each time


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parity")
    return write_models(root, hidden_size=256, intermediate_size=320, head_dim=64)


@pytest.mark.parametrize("case", LAYOUTS[2], ids=str)
def test_two_gpus_agree_with_plain_autograd(
    case: Case, folder: Path, expected: dict[str, Any]
) -> None:
    if NUM_GPUS < 2:
        pytest.skip("needs two GPUs")
    for (found,) in run_ranks(train, 2, folder=folder, cases=[case], ports=[free_port()]):
        m = found["metrics"]
        errors = {"weights": worst(found["weights"], expected["weights"])}
        if found["gradients"] is not None:
            errors["gradients"] = worst(found["gradients"], expected["gradients"])
        print(case, m["train/loss"] / expected["loss"] - 1, errors)
        assert m["train/loss"] == pytest.approx(expected["loss"], rel=RTOL_LOSS)
        assert max(errors.values()) < RTOL

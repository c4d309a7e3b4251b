"""Two steps of GRPO in every layout of two GPUs, over NCCL, against Hugging Face autograd.

The same check as tests/cpu/test_gradient_parity.py over gloo, in float32 with the GPU's kernels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parity import CASES, DENSE, Expected, apart, expected_of, train, write_models
from ranks import run_ranks

LAYOUTS = [case for case in CASES[2] if case.task == (DENSE, False)]
NUM_GPUS = torch.cuda.device_count()
RTOL_LOSS, RTOL = 1e-5, 1e-4  # of the largest value; GPUs add up in another order each time


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parity")
    write_models(root, hidden_size=256, intermediate_size=320, head_dim=64)
    return root


@pytest.fixture(scope="module")
def expected(folder: Path) -> Expected:
    return expected_of(folder, DENSE)


@pytest.fixture(scope="module")
def found(folder: Path) -> list[list[dict[str, Any]]]:
    """The results by rank and case."""
    if NUM_GPUS < 2:
        pytest.skip("needs two GPUs")
    return run_ranks(train, 2, timeout_s=400, root=folder, cases=LAYOUTS)


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=[str(c) for c in LAYOUTS])
def test_two_gpus_agree_with_plain_autograd(
    number: int, found: list[list[dict[str, Any]]], expected: Expected
) -> None:
    for rank in found:
        errors = apart(rank[number], expected)
        print(errors)
        assert errors.loss < RTOL_LOSS
        assert max(errors.weights, errors.gradient or 0.0) < RTOL

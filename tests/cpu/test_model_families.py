"""Every family against Hugging Face in every layout: logits, gradient, and the bytes back."""

from __future__ import annotations

from pathlib import Path

import pytest
from model_families import MODELS, cases, examine, write_model
from ranks import run_ranks


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("families")
    for model in MODELS:
        write_model(made / model, model)
    return made


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_family_computes_learns_and_exports_as_hugging_face_does(
    num_ranks: int, root: Path
) -> None:
    todo = cases(num_ranks)
    ranks = run_ranks(examine, num_ranks, root=root, cases=todo, timeout_s=400.0)
    for number, case in enumerate(todo):
        found = [rank[number] for rank in ranks]
        logits = [f.logits for f in found if f.logits is not None]
        assert logits, case
        assert max(logits) < 1e-4, (case, logits)
        assert max(f.gradient for f in found) < 1e-5, (case, found)
        assert found[0].round_trip, case

"""Every family against Hugging Face in every layout: logits, gradient, and the bytes back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_families import batch_of, cases, config_of, examine, make_model, write_model
from ranks import run_ranks
from training import named_weights

from tests.tiny_families import TINY_MODELS


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("families")
    for model in TINY_MODELS:
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


def biases_after(rank: int, world: int, port: int, folder: Path) -> list[dict[str, torch.Tensor]]:
    """The routers' biases after loading, after a skipped step, and after a step that trained."""
    from vime.backends.megatron.trainer import MegatronTrainer

    cfg = config_of(folder, world, {})
    moving = {"moe_router_bias_update_rate": 0.05}
    cfg = replace(
        cfg,
        model=replace(cfg.model, args=moving, override=True),
        algorithm=replace(cfg.algorithm, loss_type="policy_loss"),
    )
    trainer = MegatronTrainer(cfg, rank, world, rank, "127.0.0.1", port)
    good = batch_of(cfg)
    bad = replace(good, sequences=tuple(replace(s, reward=float("inf")) for s in good.sequences))
    found = []
    for batch in (None, bad, good):
        skipped = 0.0 if batch is None else trainer.train(batch)["train/skipped_steps"]
        assert skipped == float(batch is bad)
        weights = named_weights(trainer.actor)
        found.append({n: w for n, w in weights.items() if n.endswith("e_score_correction_bias")})
    trainer.close()
    return found


def test_a_skipped_step_does_not_move_the_routers_biases(tmp_path: Path) -> None:
    """Megatron moves them before it is known whether the gradient is finite."""
    make_model(tmp_path / "hf", "Moonlight")
    (found,) = run_ranks(biases_after, 1, folder=tmp_path / "hf", timeout_s=120.0)
    loaded, skipped, trained = found
    assert loaded
    for name, bias in loaded.items():
        assert torch.equal(skipped[name], bias)
        assert not torch.equal(trained[name], bias)

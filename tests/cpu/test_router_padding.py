"""Padding changes neither the biases of routers nor their losses, however much a pack has of it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import batch_of, config_of, make_model
from ranks import agree_on_port, run_ranks
from training import named_gradients, named_weights

BALANCING = {
    "moe_router_bias_update_rate": 0.05,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.5,
    "moe_z_loss_coeff": 0.01,
}
# (parallel settings, multiple to which each pack is padded, an empty micro-batch as well)
TURNS = {
    1: [({}, 1, False), ({}, 64, False), ({}, 128, True)],
    2: [
        ({"tp": 2, "sequence_parallel": True}, 1, False),
        ({"pp": 2}, 64, False),
        ({"cp": 2}, 1, False),
    ],
    4: [({"tp": 2, "pp": 2, "sequence_parallel": True}, 64, False)],
}


def train(rank: int, world: int, port: int, folder: Path) -> list[dict[str, dict]]:
    """Gradients, and biases after a step, of each turn."""
    from vime.backends.megatron.trainer import MegatronTrainer
    from vime.backends.megatron.training import rollout_columns

    found, plain = [], rollout_columns.lay_out
    for number, (parallel, multiple, with_empty) in enumerate(TURNS[world]):
        cfg = config_of(folder, world, parallel)
        cfg = replace(cfg, model=replace(cfg.model, args=BALANCING, override=True))
        own_port = agree_on_port(folder, f"{world} ranks, turn {number}", rank)
        trainer = MegatronTrainer(cfg, rank, world, rank, "127.0.0.1", own_port)
        rollout_columns.lay_out = partial(padded, plain, multiple)
        trainer.train(refilled(batch_of(cfg), with_empty))
        rollout_columns.lay_out = plain
        weights = named_weights(trainer.actor)
        biases = {n: w for n, w in weights.items() if n.endswith("e_score_correction_bias")}
        found.append({"gradients": named_gradients(trainer.actor), "biases": biases})
        trainer.close()
    return found


def padded(lay_out: Any, multiple: int, *args: Any, tp_shards: int, **kwargs: Any) -> Any:
    return lay_out(*args, tp_shards=max(multiple, tp_shards), **kwargs)


def refilled(batch: Any, with_empty: bool) -> Any:
    """The batch with each step in one micro-batch, and with one of padding alone if asked."""
    extra = ((),) * with_empty

    def one(step: Any) -> Any:
        merged = [(tuple(p for b in rank for p in b), *extra) for rank in step.micro_batches]
        return replace(step, micro_batches=tuple(merged))

    return replace(batch, steps=tuple(map(one, batch.steps)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("padding")
    make_model(root / "hf", "Moonlight")
    return root / "hf"


@pytest.fixture(scope="module")
def on_one_rank(folder: Path) -> list[dict[str, dict]]:
    return run_ranks(train, 1, folder=folder, timeout_s=200.0)[0]


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert expected.keys() <= found.keys()
    for name, value in expected.items():
        apart = float((found[name] - value).abs().max() / value.abs().max().clamp(min=1e-6))
        assert apart < 1e-5, (name, apart)


def test_padding_changes_neither_biases_nor_the_gradient_of_the_balancing_losses(
    on_one_rank: list[dict[str, dict]],
) -> None:
    without, with_padding, _ = on_one_rank
    assert any(b.abs().max() > 0 for b in without["biases"].values())
    assert_close(with_padding["biases"], without["biases"])
    assert_close(with_padding["gradients"], without["gradients"])


def test_a_micro_batch_of_padding_alone_counts_nothing_and_has_a_finite_gradient(
    on_one_rank: list[dict[str, dict]],
) -> None:
    without, _, with_empty = on_one_rank
    assert_close(with_empty["biases"], without["biases"])
    assert all(g.isfinite().all() for g in with_empty["gradients"].values())


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_padding_of_a_layout_does_not_change_the_biases(
    num_ranks: int, folder: Path, on_one_rank: list[dict[str, dict]]
) -> None:
    expected = on_one_rank[0]["biases"]
    for found in run_ranks(train, num_ranks, folder=folder, timeout_s=400.0):
        for turn in found:
            assert_close(turn["biases"], expected)

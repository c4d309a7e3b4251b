"""One loss, one gradient, whatever the layout and the batching; the cases are in `parity.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from parity import (
    CASES,
    DENSE,
    MAX_GRADIENT,
    MAX_LOSS,
    MODELS,
    PACKED,
    Case,
    Expected,
    apart,
    config,
    expected_of,
    groups_of,
    largest,
    run,
    worst,
    write_models,
)
from ranks import free_port, run_ranks
from training import named_gradients

from vime.data.batching import build_train_batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parity")
    write_models(root)
    return root


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Expected]:
    return {model: expected_of(folder, model) for model in MODELS}


@pytest.mark.parametrize("world", CASES)
def test_loss_gradient_and_weights_are_those_of_plain_autograd(
    world: int, folder: Path, expected: dict[str, Expected]
) -> None:
    ranks = run(folder, world)
    first: dict[str, dict] = {}
    for number, case in enumerate(CASES[world]):
        found = largest([apart(rank[number], expected[case.model]) for rank in ranks])
        assert found.loss < MAX_LOSS, (case, found)
        assert found.gradient is None or found.gradient < MAX_GRADIENT, (case, found)
        assert found.weights < MAX_GRADIENT, (case, found)
        for rank in ranks:
            m = rank[number]["metrics"]
            assert m["train/ppo_kl_first_step"] == 0.0, case
            assert 0 < m["train/pg_clipfrac"] < 1, case
            assert m["train/train_rollout_logprob_abs_diff_max"] < 2e-5, case
            same = {k: v for k, v in m.items() if not k.startswith("perf/")}
            other = first.setdefault(case.model, same)
            assert same == pytest.approx({k: other[k] for k in same}, rel=1e-4, abs=1e-5), case


def train_on_one_sequence(
    rank: int, world: int, port: int, folder: Path, ports: list[int]
) -> list[dict]:
    """Shared by two context-parallel ranks, then on one of two data-parallel ranks."""
    from vime.backends.megatron.trainer import MegatronTrainer

    results = []
    for parallel, own_port in zip(({"cp": 2}, {}), ports, strict=True):
        one = {"prompts": 1, "samples_per_prompt": 1, "steps_asked": 1}
        cfg = config(folder, world, Case("", "", parallel, PACKED | one))
        trainer = MegatronTrainer(cfg, rank, world, rank, "127.0.0.1", own_port)
        batch = build_train_batch([groups_of(folder, DENSE)[0][:1]], cfg, 0)
        metrics = trainer.train(batch)
        gradients = named_gradients(trainer)
        results.append({"plan": batch.steps[0], "metrics": metrics, "gradients": gradients})
        trainer.close()
    return results


def test_a_rank_without_a_sequence_changes_nothing(folder: Path) -> None:
    ports = [free_port(), free_port()]
    for shared, alone in run_ranks(train_on_one_sequence, 2, folder=folder, ports=ports):
        assert alone["plan"].micro_batches == (((0,),), ((),))
        assert alone["metrics"]["train/loss"] == pytest.approx(
            shared["metrics"]["train/loss"], rel=1e-6
        )
        assert worst(alone["gradients"], shared["gradients"]) < 1e-5

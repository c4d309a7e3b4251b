"""Loss and gradient are equal in every layout and batching; the cases are in `parity.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from parity import (
    ALONE,
    BY_TEACHER,
    CASES,
    DENSE,
    MAX_GRADIENT,
    MAX_LOSS,
    Case,
    Expected,
    all_expected,
    apart,
    config,
    groups_of,
    largest,
    run,
    write_models,
)

from vime.data.batching import build_train_batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parity")
    write_models(root)
    return root


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[tuple[str, bool], Expected]:
    return all_expected(folder)


@pytest.mark.parametrize("world", CASES)
def test_loss_gradient_and_weights_equal_plain_autograd(
    world: int, folder: Path, expected: dict[tuple[str, bool], Expected]
) -> None:
    ranks = run(folder, world)
    first: dict[tuple[str, bool], dict] = {}
    for number, case in enumerate(CASES[world]):
        found = largest([apart(rank[number], expected[case.task]) for rank in ranks])
        assert found.loss < MAX_LOSS, (case, found)
        if case.parallel.get("use_distributed_optimizer"):
            assert found.gradient is None, case  # sharded: only weights can be compared
        else:
            assert found.gradient < MAX_GRADIENT, (case, found)
        assert found.weights < MAX_GRADIENT, (case, found)
        for rank in ranks:
            m = rank[number]["metrics"]
            own_pass = case.model in BY_TEACHER  # advantages need its figures
            assert abs(m["train/ppo_kl_first_step"]) <= (1e-7 if own_pass else 0.0), case
            if case.batch != ALONE:  # it has one step, in which every ratio is 1
                assert 0 < m["train/pg_clipfrac"] < 1, case
            assert m["train/train_rollout_logprob_abs_diff_max"] < 2e-5, case
            same = {k: v for k, v in m.items() if not k.startswith("perf/")}
            other = first.setdefault(case.task, same)
            assert same == pytest.approx({k: other[k] for k in same}, rel=1e-4, abs=1e-5), case


def test_a_data_parallel_rank_may_have_no_sequence(folder: Path) -> None:
    case = Case("", "", {}, ALONE)
    batch = build_train_batch(groups_of(folder, DENSE, True), config(folder, 2, case), 0)
    assert batch.steps[0].micro_batches == (((0,),), ((),))

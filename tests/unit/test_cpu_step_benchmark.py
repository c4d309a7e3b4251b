"""The arithmetic of the benchmark that divides a step's time into parts."""

import pytest

from benchmarks.cpu_step import WARM_UP, step_shares
from benchmarks.records import quartiles


def record(step_time, **times):
    perf = {f"perf/{name}_time": seconds for name, seconds in times.items()}
    return {"rollout/raw_reward": 0.5, "perf/step_time": step_time, **perf}


def test_the_frameworks_share_is_the_time_of_no_other_part():
    parts = {
        "rollout": 5.0, "reward": 1.0, "log_probs": 1.0, "ref_log_probs": 0.5,
        "actor_train": 2.0, "update_weights": 0.5,
    }  # fmt: skip
    [step] = step_shares([record(99.0)] * WARM_UP + [record(10.0, **parts)])
    assert step["framework"] == pytest.approx(1.0)
    assert step["log-probs"] == 1.5
    assert step["reward"] == 1.0


def test_evaluations_and_checkpoints_do_not_count_as_step_time():
    records = [record(99.0)] * WARM_UP + [record(20.0, rollout=5.0, eval=10.0, save=4.0)]
    [step] = step_shares(records)
    assert step["step"] == pytest.approx(6.0)
    assert step["framework"] == pytest.approx(1.0)


def test_records_without_a_rollout_are_left_out_and_too_few_records_are_an_error():
    with pytest.raises(ValueError, match="too few"):
        step_shares([{"eval/addition": 0.3, "perf/step_time": 1.0}] * 9)


def test_a_spread_is_the_median_and_its_quartiles():
    assert quartiles([1.0, 2.0, 3.0]) == {"value": 2.0, "spread": [1.0, 3.0]}

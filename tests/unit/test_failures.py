"""One odd input fails its sample, with a kind and a reason. Broken hooks end the run at once."""

import asyncio
import datetime
import logging
import threading
import time
from decimal import Decimal

import numpy as np
import pytest
import torch

from tests.unit.fake_engine import make_config
from tests.unit.test_grading import finished, make_args
from vime.config.view import ArgsView
from vime.errors import PluginError
from vime.rollout import grading
from vime.rollout.failures import Failure, failing, kind_of
from vime.rollout.metrics import of_rollout
from vime.rollout.rm_hub.pool import GraderPool
from vime.rollout.rm_hub.registry import GRADERS
from vime.rollout.sampling import Sampled
from vime.types import Sample, Status

HERE = __name__
ODD = [2, 2.5, "text", [1], {"a": 1}, {1, 2}, b"bytes", Decimal("1.5"), datetime.date(2024, 1, 2)]


def grade(args, *samples):
    asyncio.run(grading.grade_group(args, list(samples)))


async def gives(args, sample, **kwargs):
    """The reward that the sample's metadata hold, or their error."""
    made = sample.metadata["made"]
    if isinstance(made, Exception):
        raise made
    return made


async def gives_all(args, samples, **kwargs):
    return [await gives(args, sample) for sample in samples]


def graded(made, **reward):
    sample = finished("x", "y", metadata={"made": made})
    grade(make_args(custom_rm_path=f"{HERE}.gives", **reward), sample)
    return sample


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: type(odd).__name__)
@pytest.mark.parametrize("name", [name for name in GRADERS if name not in ("remote_rm", "random")])
def test_no_label_or_metadata_of_an_odd_type_ends_the_run(name, odd, monkeypatch):
    """Every grader, in this process: `quick` first, then the worker's part."""

    class Here:
        def submit(self, grader, *subject):
            async def work():
                return GRADERS[grader].grade(*subject)

            return asyncio.ensure_future(work())

    monkeypatch.setattr(grading, "shared_pool", lambda num_workers, timeout_s: Here())
    monkeypatch.setattr(grading.asyncio, "wrap_future", lambda future: future)
    keys = ("correct_letter", "choices", "kwargs", "instruction_id_list", "rm_type")
    samples = [finished(r"\boxed{1}", "1", metadata={key: odd}) for key in keys]
    samples.append(finished(r"\boxed{1}", odd))
    samples.append(finished(r"\boxed{1}", "1", metadata=odd))
    grade(make_args(rm_type=name, reward_key="score"), *samples)
    for sample in samples:
        assert (sample.reward is None) == (sample.status is Status.FAILED)
        assert (sample.failure is None) == (sample.reward is not None)
    assert kind_of(samples[-1]) is Failure.GRADING or isinstance(odd, dict)


def test_values_of_every_type_reach_a_grader_process():
    pool = GraderPool(1, timeout_s=120.0)
    metadata = {str(i): odd for i, odd in enumerate(ODD)} | {"n": np.float32(1), 7: None}
    metadata |= {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    try:
        assert pool.submit("ifeval", "no comma", None, metadata).result(240) == 1.0
        failed = pool.submit("ifeval", "x", None, {"instruction_id_list": 3})
        with pytest.raises(grading.GradingFailed, match="needs a list of names .* not 3"):
            failed.result(240)
        with pytest.raises(grading.GradingFailed, match="cannot be sent to a grader process"):
            pool.submit("ifeval", "x", None, {"lock": threading.Lock()})
        assert pool.submit("ifeval", "no comma", None, metadata).result(240) == 1.0
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("made", "reward"),
    [
        (True, 1.0),
        (np.float32(0.5), 0.5),
        (np.array(2), 2.0),
        (torch.tensor(0.5), 0.5),
        (torch.tensor([0.25]), 0.25),
        (3, 3.0),
    ],
    ids=repr,
)
def test_numbers_of_every_kind_are_rewards(made, reward):
    sample = graded(made)
    assert (sample.reward, type(sample.reward)) == (reward, float)


@pytest.mark.parametrize(
    "made",
    [
        float("nan"),
        float("-inf"),
        np.float64("nan"),
        torch.tensor(float("inf")),
        torch.tensor([1.0, 2.0]),
        np.array([1.0, 2.0]),
        10**400,
        1j,
        None,
        "good",
        [],
        {},
    ],
    ids=repr,
)
@pytest.mark.parametrize("group_rm", [False, True])
def test_other_values_fail_their_sample(made, group_rm):
    good, bad = (finished("x", "y", metadata={"made": value}) for value in (1, made))
    function = "gives_all" if group_rm else "gives"
    grade(make_args(custom_rm_path=f"{HERE}.{function}", group_rm=group_rm), good, bad)
    assert good.reward == 1.0
    assert (bad.reward, kind_of(bad)) == (None, Failure.GRADING)
    assert "is no reward" in bad.failure


def test_a_reward_that_a_generation_function_set_is_checked_too():
    for made, reward in (torch.tensor(0.5), 0.5), (float("nan"), None):
        sample = finished("x", "y", reward=made)
        grade(make_args(rm_type="f1"), sample)
        assert sample.reward == reward


def test_a_dict_needs_a_number_under_the_reward_key():
    assert graded({"a": 1, "b": 2}, reward_key="b").reward == {"a": 1, "b": 2}
    for made, key, reason in (
        ({"a": 1}, None, "a dict of a. Add --reward-key"),
        ({"a": 1}, "b", "a dict of a, without --reward-key b"),
        ({"a": float("nan")}, "a", "nan, which is no reward, under --reward-key a"),
        ({"a": {"deep": 1}}, "a", "a dict, under --reward-key a"),
    ):
        sample = graded(made, reward_key=key)
        assert kind_of(sample) is Failure.GRADING
        assert reason in sample.failure


def test_a_grader_that_raises_fails_its_sample_and_the_log_shows_the_first_traceback(caplog):
    with caplog.at_level(logging.WARNING):
        good, bad = graded(0.5), graded(ZeroDivisionError("of two"))
        graded(ZeroDivisionError("of three"))
    assert good.reward == 0.5
    assert bad.failure == "grading failed: the grader raised ZeroDivisionError: of two"
    assert [record.exc_info is not None for record in caplog.records] == [True]


def test_a_group_grader_that_raises_fails_its_group():
    samples = [finished("x", "y", metadata={"made": KeyError("k")}) for _ in range(2)]
    grade(make_args(custom_rm_path=f"{HERE}.gives_all", group_rm=True), *samples)
    assert [kind_of(sample) for sample in samples] == [Failure.GRADING] * 2


def test_a_broken_contract_of_a_hook_ends_the_run():
    with pytest.raises(PluginError), failing([Sample()], Failure.GRADING, "the grader"):
        raise PluginError("its signature")
    with pytest.raises(PluginError, match="has no 'missing'"):
        grade(make_args(custom_rm_path=f"{HERE}.missing"), finished("x", "y"))


def test_an_unknown_grader_of_one_row_fails_that_sample():
    odd, good = finished("x", "x", metadata={"rm_type": "maths"}), finished("x", "x")
    grade(make_args(rm_type="f1"), odd, good)
    assert good.reward == 1.0
    assert "'maths' is unknown" in odd.failure


gate = threading.Event()


def waits(args, sample):
    gate.wait(120)
    return 1.0


def test_a_plain_grader_that_overruns_fails_its_sample_and_holds_nothing_open():
    cfg = make_config(
        "none", reward={"custom_rm_path": f"{HERE}.waits"}, engine={"request_timeout_s": 0.1}
    )
    sample = finished("x", "y")
    begun = time.monotonic()
    try:
        grade(ArgsView(cfg), sample)
        assert time.monotonic() - begun < 60
    finally:
        gate.set()
    assert kind_of(sample) is Failure.GRADING_TIMEOUT
    assert "longer than 0.1 s" in sample.failure


def test_failures_are_counted_by_their_kind():
    def group(*failures):
        return [
            Sample(index=0, status=Status.FAILED if text else Status.COMPLETED, failure=text)
            for text in failures
        ]

    sampled = Sampled(
        kept=[group("grading failed: x", None)],
        dropped=[
            group("grading failed: y", "grading timeout: z"),
            group("of my own", "teacher: q"),
        ],
    )
    metrics = of_rollout(None, sampled, 1.0, 0)
    found = {n: v for n, v in metrics.items() if n.startswith("rollout/failed/")}
    assert found == {
        "rollout/failed/grading_failed": 2,
        "rollout/failed/grading_timeout": 1,
        "rollout/failed/teacher": 1,
        "rollout/failed/other": 1,
    }

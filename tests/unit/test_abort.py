"""An abort waits for requests only: slow graders and tools neither end nor hold the rollout."""

import asyncio
import re
import threading
import time

import pytest

from tests.unit.fake_engine import FakeEngine, make_config, write_prompts
from tests.unit.test_vllm_rollout import echo, run
from vime.errors import EngineError, PluginError
from vime.rollout import generation
from vime.rollout.client import GenerateClient
from vime.rollout.failures import Failure, kind_of
from vime.types import Status

HERE = __name__
is_slow = True
gate = threading.Event()


@pytest.fixture
def config(hf, tmp_path):
    """make(**sections): 8 prompts q0..q7 with labels 0..7, two groups of two samples."""

    def make(**sections):
        prompts = str(write_prompts(tmp_path / "p.jsonl", 8))
        data = {"prompt_data": prompts, "input_key": "prompt", "label_key": "label"}
        batch = {"prompts": 2, "samples_per_prompt": 2}
        return make_config(
            hf, **({"data": data, "batch": batch, "reward": {"rm_type": "math"}} | sections)
        )

    return make


async def slow_for_others(args, sample, **kwargs):
    """Grades the first two prompts at once, the others not before an hour."""
    if is_slow and int(sample.label) > 1:
        await asyncio.sleep(3600)
    return 1.0


def plain_slow_for_others(args, sample):
    if is_slow and int(sample.label) > 1:
        gate.wait(120)
    return 1.0


@pytest.mark.parametrize("name", ["slow_for_others", "plain_slow_for_others"])
def test_a_group_that_is_being_graded_at_an_abort_is_graded_later(config, monkeypatch, name):
    reward = {"custom_rm_path": f"{HERE}.{name}"}
    monkeypatch.setattr(f"{HERE}.gate", threading.Event())
    begun = time.monotonic()
    with FakeEngine(echo) as engine:
        rollout = {"partial": True, "over_sampling": 4}
        output, source = run(engine, config(rollout=rollout, reward=reward))
        assert time.monotonic() - begun < 25
        assert [g[0].label for g in output.samples] == ["0", "1"]
        waiting = [s for group in source.buffer for s in group]
        assert [s.label for s in waiting] == ["2", "2", "3", "3"]
        assert {(s.status, s.reward) for s in waiting} == {(Status.COMPLETED, None)}
        gate.set()
        monkeypatch.setattr(f"{HERE}.is_slow", False)
        output, _ = run(engine, config(rollout={"partial": True}, reward=reward), 1, source)
        again = {f"1-{sample.index}" for sample in waiting}
        assert not again & set(engine.sessions)  # graded, and not generated a second time
    assert [g[0].label for g in output.samples] == ["2", "3"]
    assert [[s.reward for s in group] for group in output.samples] == [[1.0, 1.0]] * 2


async def slow_tool(args, sample, sampling_params):
    sample = await generation.generate(args, sample, sampling_params)
    if is_slow and int(sample.label) > 1:
        sample.tokens += [9]
        await asyncio.sleep(3600)
    return sample


def test_a_tool_that_outlasts_an_abort_is_left_and_its_sample_begins_again(config, monkeypatch):
    monkeypatch.setattr(generation, "ABORT_GRACE_S", 0.1)
    flags = {"partial": True, "custom_generate_path": f"{HERE}.slow_tool"}
    with FakeEngine(echo) as engine:
        _, source = run(engine, config(rollout={**flags, "over_sampling": 4}))
        waiting = [s for group in source.buffer for s in group]
        assert [s.label for s in waiting] == ["2", "2", "3", "3"]
        assert {(s.status, s.response_length, len(s.tokens)) for s in waiting} == {
            (Status.PENDING, 0, 2)
        }
        monkeypatch.setattr(f"{HERE}.is_slow", False)
        output, _ = run(engine, config(rollout=flags), 1, source)
    assert [g[0].label for g in output.samples] == ["2", "3"]
    assert {s.reward for g in output.samples for s in g} == {1.0}


async def hangs_for_one(args, sample, sampling_params):
    if sample.index == 1:
        await asyncio.sleep(3600)
    return await generation.generate(args, sample, sampling_params)


async def raises_for_one(args, sample, sampling_params):
    if sample.index == 1:
        raise KeyError("no tool")
    return await generation.generate(args, sample, sampling_params)


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("hangs_for_one", Failure.GENERATION_TIMEOUT, "than 0.5 s .--generate-timeout-secs"),
        ("raises_for_one", Failure.GENERATION, "raised KeyError: 'no tool'"),
    ],
)
def test_a_generation_function_that_hangs_or_raises_fails_its_sample(config, name, kind, reason):
    limit_s = 0.5 if kind is Failure.GENERATION_TIMEOUT else 60.0
    rollout = {"custom_generate_path": f"{HERE}.{name}", "generate_timeout_s": limit_s}
    with FakeEngine(echo) as engine:
        output, _ = run(engine, config(rollout=rollout))
    failed = output.samples[0][1]
    assert kind_of(failed) is kind
    assert re.search(reason, failed.failure)
    assert output.metrics[kind.metric] == 1
    assert [s.reward for g in output.samples for s in g] == [1.0, None, 1.0, 1.0]


async def raises_always(args, sample, **kwargs):
    raise KeyError("verdict")


def test_a_rollout_in_which_every_sample_fails_ends_and_says_why(config):
    cfg = config(reward={"custom_rm_path": f"{HERE}.raises_always"})
    with (
        FakeEngine(echo) as engine,
        pytest.raises(EngineError, match="4 groups failed .*grading failed: .*KeyError: 'verdict'"),
    ):
        run(engine, cfg)


def test_requests_that_no_engine_aborts_end_the_rollout():
    async def main():
        async with GenerateClient("http://here", concurrency=1, timeout_s=9) as client:
            with client._in_flight(), pytest.raises(EngineError, match="1 requests were still"):
                await client.abort(timeout_s=0.1)
            await client.abort()

    asyncio.run(main())


async def hangs(args, *subjects):
    await asyncio.sleep(3600)


@pytest.mark.parametrize("name", ["dynamic_filter_path", "sample_filter_path", "all_samples_path"])
def test_a_filter_or_hook_of_groups_that_hangs_ends_the_run_by_name(config, name):
    cfg = config(rollout={name: f"{HERE}.hangs", "generate_timeout_s": 0.2})
    with (
        FakeEngine(echo) as engine,
        pytest.raises(PluginError, match=r"hangs took longer than 0.2 s \(--generate-timeout"),
    ):
        run(engine, cfg)

"""Fully asynchronous generation against a server that speaks the engine's wire format."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.unit.fake_engine import UNTIL_ABORTED, FakeEngine, ids_of, make_config, write_prompts
from vime.backends.vllm.router import address_in_args
from vime.config.sections.rollout import FULLY_ASYNC
from vime.errors import CheckpointError, EngineError
from vime.rollout.data_source import RolloutDataSourceWithBuffer
from vime.rollout.fully_async import Generation, generate_rollout
from vime.rollout.saved_stream import load_stream, save_stream, stream_path
from vime.types import DynamicFilterOutput, Status

RIGHT = {f"q{i}": f"\\boxed{{{i}}}" for i in range(8)}


@pytest.fixture
def config(hf, tmp_path):
    """make(**sections): 8 prompts q0..q7 with labels 0..7, two groups of two samples, N = 1."""

    def make(**sections):
        prompts = write_prompts(tmp_path / "p.jsonl", 8)
        data = {"prompt_data": str(prompts), "input_key": "prompt", "label_key": "label"}
        defaults = {
            "data": data,
            "batch": {"prompts": 2, "samples_per_prompt": 2, "num_rollout": 10},
            "reward": {"rm_type": "math"},
            "rollout": {"function_path": FULLY_ASYNC, "max_weight_staleness": 1},
            "checkpoint": {"save": str(tmp_path / "ckpt")},
        }
        merged = {name: part | sections.pop(name, {}) for name, part in defaults.items()}
        return make_config(hf, **merged, **sections)

    return make


def echo(prompt, params):
    return [*ids_of("\\boxed{" + chr(28 + prompt[1]) + "}"), 2], 0.001


@contextmanager
def generating(engine: FakeEngine, cfg: Any, steps: int = 10) -> Iterator[Generation]:
    runtime = {"vllm_engine_urls": (engine.url,), **address_in_args(engine.url)}
    source = RolloutDataSourceWithBuffer(engine.args(cfg))
    generation = Generation(cfg, runtime, source, steps)
    try:
        yield generation
    finally:
        generation.suspend()
        generation.close()


def groups(generation: Generation, step: int) -> Any:
    return generate_rollout(generation.args, step, generation.data_source)


def prompts_of(output: Any) -> list[str]:
    return [group[0].prompt for group in output.samples]


def test_groups_stream_within_the_cap_and_carry_the_metrics(config):
    with FakeEngine(echo, version=0) as engine, generating(engine, config()) as generation:
        generation.weights_are(0)
        first = groups(generation, 0)
        second = groups(generation, 1)  # one version ahead of the weights
        assert prompts_of(first) + prompts_of(second) == ["q0", "q1", "q2", "q3"]
        assert len(engine.log) == 8  # nothing more may start with version 0
        assert [s.rollout_id for group in second.samples for s in group] == [1] * 4
        assert [s.reward for group in second.samples for s in group] == [1.0] * 4
        assert second.metrics["rollout/staleness/mean"] == 1.0
        assert second.metrics["rollout/staleness/share_1"] == 1.0
        engine.version = 2
        generation.weights_are(2)
        third = groups(generation, 2)
        assert third.metrics["rollout/staleness/max"] == 0
        assert third.metrics["perf/generation_time"] > 0
    salts = {body["cache_salt"] for body in engine.log}
    assert salts == {"0", "2"}


def test_no_group_starts_that_no_step_would_train(config):
    with FakeEngine(echo) as engine, generating(engine, config(), steps=1) as generation:
        generation.weights_are(0)
        groups(generation, 0)
        assert len(engine.log) == 4


def test_with_a_recomputed_cache_requests_share_prefixes(config):
    cfg = config(rollout={"recompute_kv_cache": True})
    with FakeEngine(echo) as engine, generating(engine, cfg) as generation:
        generation.weights_are(0)
        groups(generation, 0)
    assert all("cache_salt" not in body for body in engine.log)


def test_unfinished_and_finished_groups_survive_a_restart(config):
    """q0 and q2 do not end before the abort; q1 and q3 do."""

    def slow_when_even(prompt, params):
        tokens, seconds = echo(prompt, params)
        return tokens, seconds if prompt[1] % 2 else UNTIL_ABORTED

    cfg = config()
    with FakeEngine(slow_when_even, version=0) as engine, generating(engine, cfg) as generation:
        generation.weights_are(0)
        while len(generation.stream.ready) < 2:
            pass
        with generation.suspended() as entries:
            generation.data_source.save(0)
            save_stream(cfg, 0, entries)
            saved = {e.group[0].prompt: (e.finished, e.num_tokens > 0) for e in entries}
    assert len(saved) == 4
    assert sorted(saved.values()) == [(False, True)] * 2 + [(True, True)] * 2
    with FakeEngine(echo, version=1) as engine, generating(engine, cfg) as generation:
        generation.data_source.load(0)
        generation.restore(load_stream(cfg, 0))
        generation.weights_are(0)
        trained = [group for step in (0, 1) for group in groups(generation, step).samples]
    assert sorted(group[0].prompt for group in trained) == ["q0", "q1", "q2", "q3"]
    first_tokens = [group[0].weight_versions[0] for group in trained]
    assert first_tokens == [0] * 4  # no group began again
    assert sorted(len(set(group[0].weight_versions)) for group in trained) == [1, 1, 2, 2]


def test_changed_sampling_flags_begin_the_groups_again(config, caplog):
    cfg = config()
    with FakeEngine(echo) as engine, generating(engine, cfg) as generation:
        generation.weights_are(0)
        groups(generation, 0)
        with generation.suspended() as entries:
            save_stream(cfg, 0, entries)
    assert load_stream(cfg, 0)[0].num_tokens
    assert load_stream(config(rollout={"max_weight_staleness": 3}), 0)[0].num_tokens
    other = load_stream(config(rollout={"temperature": 0.5}), 0)
    assert [entry.num_tokens for entry in other] == [0, 0]
    assert "--rollout-temperature" in caplog.text
    stream_path(str(cfg.checkpoint.save), 0).write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="stream_0.pt is damaged"):
        load_stream(cfg, 0)


def keeps_odd(args, samples):
    return DynamicFilterOutput(samples[0].group_index % 2 == 1, "even")


def test_filters_and_over_sampling_work_as_in_other_modes(config):
    rollout = {"dynamic_filter_path": f"{__name__}.keeps_odd", "over_sampling": 4}
    with (
        FakeEngine(echo) as engine,
        generating(engine, config(rollout=rollout)) as generation,
    ):
        generation.weights_are(0)
        output = groups(generation, 0)
    assert all(group[0].group_index % 2 == 1 for group in output.samples)
    assert output.metrics["rollout/dynamic_filter/drop_even"] >= 2


async def two_turns(args, sample, sampling_params):
    from vime.rollout.generation import append_observation, generate

    await generate(args, sample, sampling_params)
    append_observation(sample, "go on")
    sample.status = Status.PENDING
    return await generate(args, sample, sampling_params)


def test_custom_generation_works_as_in_other_modes(config):
    rollout = {"custom_generate_path": f"{__name__}.two_turns", "max_response_len": 64}
    with (
        FakeEngine(echo) as engine,
        generating(engine, config(rollout=rollout)) as generation,
    ):
        generation.weights_are(0)
        output = groups(generation, 0)
    assert all(0 in sample.loss_mask for group in output.samples for sample in group)


def test_a_dead_engine_is_told_and_the_stream_goes_on_when_it_is_back(config):
    with FakeEngine(echo, faults=[400] * 16) as engine, generating(engine, config()) as generation:
        generation.weights_are(0)
        with pytest.raises(EngineError, match="4 groups failed one after the other"):
            groups(generation, 0)
        engine.faults.clear()
        assert len(groups(generation, 0).samples) == 2


def test_args_can_be_pickled_without_the_stream(config):
    with FakeEngine(echo) as engine, generating(engine, config()) as generation:
        assert pickle.loads(pickle.dumps(generation.args)).generation is None

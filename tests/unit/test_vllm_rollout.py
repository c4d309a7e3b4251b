"""The default rollout function against a server that speaks the engine's wire format."""

import asyncio
import itertools
import logging
import socket
import time

import aiohttp
import pytest

from tests.unit.fake_engine import UNTIL_ABORTED, FakeEngine, ids_of, make_config, write_prompts
from vime.config.view import ArgsView
from vime.data import chat
from vime.data.sample_metrics import of_samples
from vime.errors import EngineError, PluginError
from vime.rollout.client import GenerateClient
from vime.rollout.data_source import RolloutDataSourceWithBuffer
from vime.rollout.generation import append_observation, generate
from vime.rollout.posting import FewHandshakes, RequestFailed
from vime.rollout.train_data import make_train_batch
from vime.rollout.vllm_rollout import generate_rollout
from vime.types import DynamicFilterOutput, Sample, Status

DIFFERENT = [32 + (i * i * 7 + i // 5) % 95 for i in range(2400)]  # characters without a pattern


@pytest.fixture
def config(hf, tmp_path):
    """make(**sections): 8 prompts q0..q7 with labels 0..7, two groups of two samples."""

    def make(**sections):
        prompts = write_prompts(tmp_path / "p.jsonl", 8)
        data = {"prompt_data": str(prompts), "input_key": "prompt", "label_key": "label"}
        sections["data"] = data | sections.get("data", {})
        sections["batch"] = {"prompts": 2, "samples_per_prompt": 2} | sections.get("batch", {})
        sections["reward"] = {"rm_type": "math"} | sections.get("reward", {})
        return make_config(hf, **sections)

    return make


def boxed(text):
    return [*ids_of("\\boxed{" + text + "}"), 2]


def echo(prompt, params):
    """The right answer: \\boxed{3} for `q3`."""
    return boxed(chr(28 + prompt[1])), 0.001


def run(engine, cfg, rollout_id=0, source=None, **runtime):
    args = engine.args(cfg, **runtime)
    source = source or RolloutDataSourceWithBuffer(args)
    return generate_rollout(args, rollout_id, source), source


def test_a_sample_holds_the_engines_answer_token_by_token(config):
    with FakeEngine(echo, version=7) as engine:
        output, _ = run(engine, config(), rollout_id=5)
    assert [[s.index for s in g] for g in output.samples] == [[0, 1], [2, 3]]
    sample = output.samples[1][0]
    answer = boxed("1")
    assert sample.tokens == ids_of("q1") + answer
    assert sample.response_length == len(answer)
    assert sample.response == "\\boxed{1}<|im_end|>"
    assert sample.rollout_log_probs == pytest.approx([-t / 1000 for t in answer])
    assert sample.weight_versions == [7] * len(answer)
    assert (sample.reward, sample.status, sample.rollout_id) == (1.0, Status.COMPLETED, 5)
    assert output.metrics["rollout/weight_version/max"] == 7


def test_rollout_and_batch_do_not_write_the_same_metric(config):
    cfg = config()
    with FakeEngine(echo, faults=[400]) as engine:
        output, _ = run(engine, cfg)
    batch = make_train_batch(ArgsView(cfg), output.samples, 0)
    assert batch.metrics["rollout/failed_samples"] == 1
    assert batch.metrics["rollout/response_len/max"] == len(boxed("1"))
    assert len(output.metrics) > 8
    assert not output.metrics.keys() & batch.metrics.keys()


def test_requests_carry_the_sampling_flags_and_on_request_a_seed_for_each_sample(config):
    flags = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "max_response_len": 20}
    with FakeEngine(echo) as engine:
        run(engine, config())
    assert all("seed" not in body["sampling_params"] for body in engine.log)
    cfg = config(rollout={**flags, "deterministic": True}, data={"seed": 100})
    with FakeEngine(echo) as engine:
        run(engine, cfg)
    params = [body["sampling_params"] for body in engine.log]
    assert sorted(p["seed"] for p in params) == [100, 101, 102, 103]
    wanted = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "max_tokens": 20, "logprobs": 0}
    assert all(wanted.items() <= p.items() for p in params)


def test_responses_are_truncated_by_their_own_limit_and_by_the_context(config):
    for rollout, length in ({"max_response_len": 4}, 4), ({"max_context_len": 7}, 5):
        with FakeEngine(echo) as engine:
            output, _ = run(engine, config(rollout=rollout))
        sample = output.samples[0][0]
        assert (sample.status, sample.response_length) == (Status.TRUNCATED, length)
        samples = [sample for group in output.samples for sample in group]
        assert of_samples(samples, needs_reward=True)["rollout/truncated_ratio"] == 1.0


def test_temporary_errors_are_retried_and_counted(config):
    with FakeEngine(echo, faults=[503, None, 500]) as engine:
        output, _ = run(engine, config())
    assert [s.reward for g in output.samples for s in g] == [1.0] * 4
    assert output.metrics["rollout/request_retries"] == 3


@pytest.mark.parametrize("status", [400, 404, 422, 429])
def test_a_4xx_is_never_retried(status):
    async def post(url):
        async with GenerateClient(url, concurrency=4, timeout_s=10) as client:
            with pytest.raises(RequestFailed, match=f"HTTP {status}: fault on purpose"):
                await client.generate([4], {"max_tokens": 1})
            return client.endpoint.num_retries

    with FakeEngine(echo, faults=[status, status]) as engine:
        assert asyncio.run(post(engine.url)) == 0
        assert engine.faults == [status]


def test_repetitive_responses_are_counted(config):
    def answer(prompt, params):
        around = "wait, " * 400 if prompt[1] == ids_of("0")[0] else "".join(map(chr, DIFFERENT))
        return ids_of(around) + [2], 0.001

    with FakeEngine(answer) as engine:
        output, _ = run(engine, config(rollout={"max_response_len": 3000}))
    assert output.metrics["rollout/repetition_frac"] == 0.5


def test_every_request_carries_the_engines_key(config):
    with FakeEngine(echo, api_key="k1") as engine:
        output, _ = run(engine, config(), vllm_api_key="k1")
        assert {s.status for g in output.samples for s in g} == {Status.COMPLETED}
        with pytest.raises(EngineError, match="HTTP 401"):
            run(engine, config())


def test_a_request_fails_when_the_engine_is_away_for_longer_than_the_retry_window():
    async def post():
        client = GenerateClient(
            "http://127.0.0.1:9", concurrency=4, timeout_s=10, retry_window_s=0.5
        )
        async with client:
            with pytest.raises(RequestFailed, match="kept failing"):
                await client.generate([4], {"max_tokens": 1})

    asyncio.run(asyncio.wait_for(post(), 60))


def test_a_request_that_misses_its_deadline_names_the_flag():
    async def post(url):
        async with GenerateClient(url, concurrency=4, timeout_s=0.2) as client:
            with pytest.raises(RequestFailed, match="--router-request-timeout-secs"):
                await client.generate([4], {"max_tokens": 1})

    with FakeEngine(lambda prompt, params: ([5], UNTIL_ABORTED)) as engine:
        asyncio.run(asyncio.wait_for(post(engine.url), 60))


def test_concurrency_is_bounded_per_engine(config):
    running, most = [], []

    def answer(prompt, params):
        running.append(1)
        most.append(len(engine._abort) + 1)
        return boxed("0"), 0.001

    with FakeEngine(answer, at_once=3) as engine:
        run(engine, config(rollout={"concurrency": 3}, batch={"samples_per_prompt": 8}))
    assert len(running) == 16
    assert max(most) == 3


def test_a_burst_of_requests_does_not_flood_the_listener():
    """A refused connection also frees its slot, so the requests behind it end too."""
    begun = []

    def noted(address):
        begun.append(time.monotonic())
        return socket.socket(*address[:3])

    async def burst(url):
        connector = FewHandshakes(4, 0.05, socket_factory=noted)
        async with aiohttp.ClientSession(connector=connector) as session:
            requests = (session.get(url) for _ in range(20))
            return await asyncio.wait_for(asyncio.gather(*requests, return_exceptions=True), 30)

    with FakeEngine(echo) as engine:
        answers = asyncio.run(burst(f"{engine.url}/health"))
    assert [answer.status for answer in answers] == [200] * 20
    apart = [later - first for first, later in zip(begun, begun[4:], strict=False)]
    assert len(apart) == 16
    assert min(apart) > 0.045
    refused = asyncio.run(burst("http://127.0.0.1:9"))
    assert [type(error) for error in refused] == [aiohttp.ClientConnectorError] * 20


def test_missing_log_probabilities_end_the_rollout_with_the_reason(config):
    with (
        FakeEngine(echo, with_log_probs=False) as engine,
        pytest.raises(EngineError, match="log-probabilities"),
    ):
        run(engine, config())


def test_a_failed_sample_does_not_fail_its_group(config):
    with FakeEngine(echo, faults=[400]) as engine:
        output, _ = run(engine, config())
    statuses = sorted(s.status.value for g in output.samples for s in g)
    assert statuses == ["completed"] * 3 + ["failed"]
    samples = [s for g in output.samples for s in g]
    assert of_samples(samples, needs_reward=True)["rollout/failed_samples"] == 1
    (failed,) = [s for g in output.samples for s in g if s.status is Status.FAILED]
    assert "HTTP 400" in failed.failure
    assert failed.reward is None


turn = itertools.count()


def half_right(prompt, params):
    """Of each two samples, one is right for q0, q2, .. and both are right for q1, q3, .."""
    number = prompt[1] - ids_of("0")[0]
    right = number % 2 or next(turn) % 2
    return boxed(str(number) if right else "x1"), 0.002


FILTER = "vime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"


def keep_even_with_reason(args, samples, **kwargs):
    return DynamicFilterOutput(int(samples[0].label) % 2 == 0, "odd")


@pytest.mark.parametrize(
    ("path", "reason"), [(FILTER, "zero_std_1"), (f"{__name__}.keep_even_with_reason", "odd")]
)
def test_filtered_groups_are_counted_by_reason_and_replaced(config, path, reason):
    cfg = config(rollout={"dynamic_filter_path": path}, batch={"prompts": 3})
    with FakeEngine(half_right) as engine:
        output, _ = run(engine, cfg)
    assert [g[0].label for g in output.samples] == ["0", "2", "4"]
    assert output.metrics[f"rollout/dynamic_filter/drop_{reason}"] >= 2


def slow_after_two(prompt, params):
    """A short answer to the first two prompts; 1000 tokens to the others, until an abort."""
    is_short = prompt[1] < ids_of("2")[0]
    return (boxed("0"), 0.001) if is_short else (ids_of("7" * 1000), UNTIL_ABORTED)


def test_partial_rollout_keeps_tokens_and_log_probabilities_and_continues(config):
    cfg = config(rollout={"partial": True, "over_sampling": 4})
    engine = FakeEngine(slow_after_two, version=3, at_once=8)
    with engine:
        output, source = run(engine, cfg, rollout_id=4)
        assert [g[0].label for g in output.samples] == ["0", "1"]
        assert engine.num_aborts >= 1
        waiting = source.buffer
        assert [g[0].label for g in waiting] == ["2", "3"]
        assert {s.status for g in waiting for s in g} == {Status.ABORTED}
        parts = {s.index: (s.response_length, list(s.tokens)) for g in waiting for s in g}

        engine.version, engine.log, engine.at_once = 4, [], 0
        engine.answer = lambda prompt, params: (ids_of("8" * 1200), 0.002)
        cfg = config(rollout={"partial": True, "max_response_len": 1100, "mask_offpolicy": True})
        source.cfg = cfg
        output, _ = run(engine, cfg, rollout_id=5, source=source)
    for body in engine.log:  # it has prompt and partial tokens, and the budget counts both
        index = next(i for i, (_, tokens) in parts.items() if tokens == body["token_ids"])
        assert body["sampling_params"]["max_tokens"] == 1100 - parts[index][0]
    for sample in (s for g in output.samples for s in g):
        old, tokens = parts[sample.index]
        assert sample.tokens[: len(tokens)] == tokens
        assert sample.response_length == len(sample.rollout_log_probs) == 1100
        assert sample.weight_versions == [3] * old + [4] * (1100 - old)
        assert sample.loss_mask == [0] * old + [1] * (1100 - old)
        assert sample.rollout_log_probs == pytest.approx(
            [-t / 1000 for t in sample.tokens[sample.prompt_length :]]
        )
        assert sample.metadata["start_rollout_id"] == 4
    assert [old for old, _ in parts.values()] == [500] * 4


def test_without_partial_rollout_the_rest_is_aborted_and_dropped(config):
    with FakeEngine(slow_after_two, at_once=8) as engine:
        output, source = run(engine, config(rollout={"over_sampling": 4}))
    assert source.buffer == []
    assert output.metrics["rollout/groups_aborted"] == 2
    assert output.metrics["perf/longest_sample_tokens_per_sec"] > 0


all_asked: asyncio.Barrier | None = None


async def when_all_are_asked(args, sample, **kwargs):
    """All twelve samples get their reward in the same turn of the event loop."""
    await all_asked.wait()
    return 1.0


def test_finished_surplus_goes_to_the_next_rollout_without_a_second_generation_or_grading(
    config, monkeypatch
):
    monkeypatch.setattr(f"{__name__}.all_asked", asyncio.Barrier(12))
    reward = {"custom_rm_path": f"{__name__}.when_all_are_asked"}
    with FakeEngine(lambda prompt, params: (boxed("1"), 0.001)) as engine:
        cfg = config(rollout={"partial": True, "over_sampling": 6}, reward=reward)
        output, source = run(engine, cfg)
        assert output.metrics["rollout/groups_surplus"] == 4
        assert output.metrics["rollout/groups_aborted"] == 0
        assert [[s.reward for s in group] for group in source.buffer] == [[1.0, 1.0]] * 4
        surplus = [s.index for group in source.buffer[:2] for s in group]
        monkeypatch.setattr(f"{__name__}.all_asked", None)  # grading a sample again would fail
        output, _ = run(engine, config(rollout={"partial": True}, reward=reward), 1, source)
        assert len(engine.log) == 12
    samples = [s for group in output.samples for s in group]
    assert [s.index for s in samples] == surplus
    assert [s.metadata["start_rollout_id"] for s in samples] == [0] * 4
    assert [s.reward for s in samples] == [1.0] * 4


def remove_first(args, groups):
    for group in groups:
        group[0].remove_sample = True


def note_all(args, all_samples, data_source):
    data_source.seen = [s.index for s in all_samples]


def test_the_sample_filter_and_the_hook_for_all_samples_are_called(config):
    hooks = {"sample_filter_path": "remove_first", "all_samples_path": "note_all"}
    rollout = {name: f"{__name__}.{function}" for name, function in hooks.items()}
    with FakeEngine(slow_after_two, at_once=8) as engine:
        output, source = run(engine, config(rollout={**rollout, "over_sampling": 4}))
    assert [[s.remove_sample for s in g] for g in output.samples] == [[True, False]] * 2
    assert sorted(source.seen) == list(range(8))


async def two_turns(args, sample, sampling_params):
    """Generates, appends an observation without loss, and generates again."""
    sample = await generate(args, sample, sampling_params)
    seen = ids_of("ok?")
    sample.loss_mask = [1] * sample.response_length + [0] * len(seen)
    sample.tokens += seen
    sample.response_length += len(seen)
    sample.rollout_log_probs += [0.0] * len(seen)
    sample.weight_versions += [-1] * len(seen)
    return await generate(args, sample, sampling_params)


def test_a_custom_generation_function_can_generate_twice(config):
    cfg = config(rollout={"custom_generate_path": f"{__name__}.two_turns"})
    with FakeEngine(echo) as engine:
        output, _ = run(engine, cfg)
    sample = output.samples[0][0]
    count = len(boxed("0"))
    assert sample.loss_mask == [1] * count + [0] * 3 + [1] * count
    assert sample.response == "\\boxed{0}<|im_end|>ok?\\boxed{0}<|im_end|>"
    assert len(sample.rollout_log_probs) == sample.response_length


def test_generate_outside_a_rollout_is_refused(config):
    sample = Sample(prompt="1 + 1", tokens=[1])
    outside = "inside a rollout only.*--custom-generate-function-path"
    with pytest.raises(PluginError, match=outside):
        asyncio.run(generate(None, sample, {"max_tokens": 1}))
    with pytest.raises(PluginError, match=outside):
        append_observation(sample, "2")
    with FakeEngine(echo) as engine:
        run(engine, config())
    with pytest.raises(PluginError, match=outside):  # also after a rollout has ended
        asyncio.run(generate(None, sample, {"max_tokens": 1}))


async def from_messages(args, sample, sampling_params):
    sample.tokens, sample.prompt = [], [{"role": "user", "content": "hm"}]
    return await generate(args, sample, sampling_params)


def test_a_prompt_of_messages_is_tokenised_by_the_chat_template(config, hf):
    cfg = config(rollout={"custom_generate_path": f"{__name__}.from_messages"})
    with FakeEngine(lambda prompt, params: (boxed("0"), 0.001)) as engine:
        output, _ = run(engine, cfg)
    tokenizer = chat.load_tokenizer(hf)
    wanted = chat.encode(tokenizer, [chat.render(tokenizer, "hm")])[0]
    for sample in output.samples[0]:
        assert sample.tokens[: sample.prompt_length] == wanted


def test_a_rollout_without_any_thinking_mark_gives_a_warning(config, caplog):
    with FakeEngine(echo) as engine, caplog.at_level(logging.WARNING):
        output, _ = run(engine, config(reward={"rm_type": "deepscaler"}))
    assert {s.reward for g in output.samples for s in g} == {0.0}
    assert "</think>" in caplog.text


def test_evaluation_inherits_values_that_no_eval_flag_overrides(config, tmp_path):
    path = write_prompts(tmp_path / "eval.jsonl", 4)
    cfg = config(
        rollout={"temperature": 0.7, "top_k": 5, "max_response_len": 9, "max_prompt_len": 2},
        eval={
            "interval": 1,
            "prompt_data": ["held", str(path), "slice", f"{path}@[0:2]"],
            "samples_per_prompt": 4,
            "top_p": 0.5,
            "max_response_len": 11,
        },
    )
    with FakeEngine(half_right) as engine:
        output = generate_rollout(engine.args(cfg), 3, None, evaluation=True)
        params = [body["sampling_params"] for body in engine.log]
    assert {(p["temperature"], p["top_k"], p["top_p"], p["max_tokens"]) for p in params} == {
        (0.7, 5, 0.5, 11)
    }
    assert sorted(output.data) == ["held", "slice"]
    assert len(output.data["held"]["rewards"]) == len(output.data["held"]["samples"]) == 16
    assert output.metrics["eval/held"] == pytest.approx(0.75)
    assert output.metrics["eval/held-pass@1"] == pytest.approx(0.75)
    # q0 and q2 have 2 of 4 right: a pair has none with probability 1/6. q1 and q3 are always right.
    assert output.metrics["eval/held-pass@2"] == pytest.approx((2 * 5 / 6 + 2) / 4)
    assert output.metrics["eval/held-pass@4"] == 1.0
    assert output.metrics["eval/held-truncated_ratio"] == 0.0
    assert output.metrics["eval/slice"] == pytest.approx(0.75)

"""The default rollout function against a running vLLM behind its router."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import pytest
import requests

from tests.cpu.rollout_setting import router, setting  # noqa: F401, fixtures
from tests.unit.fake_engine import write_prompts
from vime.data import chat
from vime.rollout.teacher import check_teacher
from vime.rollout.vllm_rollout import generate_rollout
from vime.rollout.wire import (
    ALL,
    MAGIC,
    PACKED,
    PATH,
    PLAIN,
    TEXT,
    build_request,
    parse_response,
)
from vime.types import Status


def scored_by_the_engine(url, sample):
    """The engine's own log-probabilities of a finished response that it gets as a prompt."""
    params = {"prompt_logprobs": 0, "max_tokens": 1, "temperature": 1.0, "detokenize": False}
    body = {"token_ids": sample.tokens, "sampling_params": params}
    answer = requests.post(url + PATH, json=body, timeout=60)
    assert answer.ok, answer.text
    entries = answer.json()["prompt_logprobs"][sample.prompt_length :]
    tokens = sample.tokens[sample.prompt_length :]
    return [
        next(e["logprob"] for e in entry if e["token_id"] == token)
        if isinstance(entry, list)
        else entry[str(token)]["logprob"]
        for entry, token in zip(entries, tokens, strict=True)
    ]


def check(sample):
    assert sample.status in (Status.COMPLETED, Status.TRUNCATED)
    assert 0 < sample.response_length == len(sample.rollout_log_probs)
    assert len(sample.weight_versions) == sample.response_length
    assert all(logp <= 0 for logp in sample.rollout_log_probs)


def test_every_token_has_the_log_probability_that_the_engine_gives_it(setting, tied_engine):
    args, source = setting(rollout={"max_response_len": 12})
    output = generate_rollout(args, 0, source)
    assert [len(group) for group in output.samples] == [4] * 4
    samples = [s for group in output.samples for s in group]
    for sample in samples:
        check(sample)
    assert len({tuple(s.tokens) for s in samples}) > 4  # samples of a prompt differ
    for sample in samples[:3]:
        assert sample.rollout_log_probs == pytest.approx(
            scored_by_the_engine(tied_engine.url, sample), abs=1e-4
        )


def test_a_served_teacher_gives_each_token_its_log_probability(setting, tied_engine):
    """The engine is its own teacher, over the API of a user's server."""
    algorithm = {"use_opd": True, "opd_type": "vllm", "opd_teacher_url": tied_engine.url}
    args, source = setting(rollout={"max_response_len": 12}, algorithm=algorithm)
    own = dataclasses.replace(args.config.model, hf_checkpoint=str(tied_engine.hf_dir))
    assert check_teacher(dataclasses.replace(args.config, model=own)) == []
    (other_words,) = check_teacher(args.config)
    assert "whose tokenizer differs from the tokenizer of --hf-checkpoint" in other_words
    output = generate_rollout(args, 0, source)
    for sample in (s for group in output.samples for s in group):
        assert len(sample.teacher_log_probs) == sample.response_length > 0
        assert sample.teacher_log_probs == pytest.approx(sample.rollout_log_probs, abs=1e-4)


def test_dynamic_sampling_refills_until_the_target_is_met(setting):
    path = "vime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"
    args, source = setting(
        rollout={"max_response_len": 4, "dynamic_filter_path": path, "over_sampling": 5},
        batch={"prompts": 4, "samples_per_prompt": 2},
    )
    output = generate_rollout(args, 0, source)
    assert len(output.samples) == 4
    assert all(len({s.reward for s in group}) == 2 for group in output.samples)
    drops = [v for k, v in output.metrics.items() if k.startswith("rollout/dynamic_filter/drop_")]
    taken = output.metrics["rollout/groups_taken"]
    assert taken % 5 == 0
    left = output.metrics["rollout/groups_surplus"] + output.metrics["rollout/groups_aborted"]
    assert taken == 4 + sum(drops) + left


async def first_two_are_short(args, sample, sampling_params):
    from vime.rollout.generation import generate

    short = sample.group_index < 2 and sample.rollout_id == 0
    return await generate(args, sample, sampling_params | ({"max_tokens": 2} if short else {}))


def test_aborted_samples_continue_where_they_stopped(setting, tied_engine):
    rollout = {
        "partial": True,
        "over_sampling": 4,
        "max_response_len": 200,
        "custom_generate_path": f"{__name__}.first_two_are_short",
    }
    args, source = setting(rollout=rollout, batch={"prompts": 2, "samples_per_prompt": 4})
    first = generate_rollout(args, 0, source)
    assert [g[0].group_index for g in first.samples] == [0, 1]
    assert [g[0].group_index for g in source.buffer] == [2, 3]
    waiting = [s for g in source.buffer for s in g]
    assert Counter(s.status for s in waiting)[Status.ABORTED] >= 4
    parts = {s.index: (list(s.tokens), list(s.rollout_log_probs)) for s in waiting}
    assert sum(s.response_length for s in waiting) > 0

    args, _ = setting(
        rollout=rollout | {"over_sampling": 2}, batch={"prompts": 2, "samples_per_prompt": 4}
    )
    second = generate_rollout(args, 1, source)
    assert [g[0].group_index for g in second.samples] == [2, 3]
    for sample in (s for group in second.samples for s in group):
        check(sample)
        tokens, log_probs = parts[sample.index]
        assert sample.tokens[: len(tokens)] == tokens
        assert sample.rollout_log_probs[: len(log_probs)] == log_probs
        if log_probs:
            assert sample.metadata["start_rollout_id"] == 0
    longest = max((s for g in second.samples for s in g), key=lambda s: s.response_length)
    assert longest.rollout_log_probs == pytest.approx(
        scored_by_the_engine(tied_engine.url, longest), abs=1e-4
    )


def test_after_an_abort_the_engine_still_serves_and_an_evaluation_runs(setting, tmp_path):
    path = write_prompts(tmp_path / "eval.jsonl", 6)
    args, _ = setting(
        rollout={"max_response_len": 8},
        eval={"interval": 1, "prompt_data": [str(path)], "samples_per_prompt": 2, "top_k": 1},
    )
    output = generate_rollout(args, 0, None, evaluation=True)
    samples = output.data["aime"]["samples"]
    assert len(samples) == 12
    assert all(a.tokens == b.tokens for a, b in zip(samples[::2], samples[1::2], strict=True))
    assert 0.0 <= output.metrics["eval/aime"] <= 1.0


def test_a_deterministic_rollout_repeats_itself_with_split_prompts(setting, tmp_path):
    """96 x 432 prompt tokens do not fit into one step of the engine, so some are prefilled in two.
    Without the patch "seeds of split prompts" that ends the engine.
    """
    rows = [{"prompt": f"{i:02d}" + "word " * 86} for i in range(96)]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def rollout(seed):
        args, source = setting(
            data={"prompt_data": str(path), "apply_chat_template": False, "seed": seed},
            batch={"prompts": 96, "samples_per_prompt": 1},
            rollout={"max_response_len": 24, "deterministic": True},
        )
        output = generate_rollout(args, 0, source)
        return [s.tokens for group in output.samples for s in group]

    first = rollout(1)
    assert min(len(tokens) for tokens in first) > 432
    assert rollout(1) == first
    other = rollout(2)
    assert sum(a != b for a, b in zip(first, other, strict=True)) > 80


def ask(url, packed, token_ids=(5, 6, 7), text=None, **params):
    given = {"temperature": 0.0, "max_tokens": 8} | params
    return requests.post(
        url + PATH,
        data=build_request(list(token_ids), given),
        headers={"Content-Type": "application/json"}
        | ({PACKED: "1"} if packed else {})
        | ({TEXT: text} if text else {}),
        timeout=60,
    )


def test_a_packed_answer_equals_the_engines_own(router):
    packed, stock = ask(router, True), ask(router, False)
    assert "choices" in stock.json()
    assert packed.content.startswith(MAGIC)
    found, expected = parse_response(packed.content), parse_response(stock.content)
    assert len(found.token_ids) == 8
    assert found.token_ids == expected.token_ids
    assert found.log_probs == pytest.approx(expected.log_probs, abs=1e-6)
    assert found.status is expected.status is Status.TRUNCATED
    assert found.weight_versions == expected.weight_versions
    ended = parse_response(ask(router, True, stop_token_ids=found.token_ids[:1]).content)
    assert ended.status is Status.COMPLETED
    assert ended.token_ids == found.token_ids[:1]


def test_the_engine_gives_the_text_that_the_client_would_decode(router, tied_checkpoint):
    tokenizer = chat.load_tokenizer(str(tied_checkpoint))
    assert parse_response(ask(router, True).content).text is None
    for text, skips in ((ALL, False), (PLAIN, True)):
        params = {"temperature": 2.0, "max_tokens": 64, "seed": 1, "ignore_eos": True}
        found = parse_response(ask(router, True, text=text, **params).content)
        assert len(found.token_ids) == 64
        expected = chat.decode(tokenizer, found.token_ids, skip_special_tokens=skips)
        assert found.text == expected


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"temprature": 1.0}, "vLLM has no sampling parameter temprature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1.0}, "temperature must be non-negative"),
        ({"token_ids": range(5000)}, "5000"),
    ],
)
def test_a_request_that_the_engine_cannot_take_is_refused_with_a_reason(router, wrong, words):
    answer = ask(router, True, **wrong)
    assert answer.status_code == 400, answer.text
    assert words in answer.text

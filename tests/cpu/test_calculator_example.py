"""The calculator environment with a live engine, which also scores the resulting tokens."""

from __future__ import annotations

import pytest

from examples.calculator import environment
from tests.cpu.rollout_setting import router, setting  # noqa: F401, fixtures
from tests.cpu.test_rollout_engine import scored_by_the_engine
from vime.data.batching import build_train_batch
from vime.data.chat import load_tokenizer
from vime.rollout.vllm_rollout import generate_rollout
from vime.rollout.wire import UNKNOWN_VERSION
from vime.types import Status


def test_turns_are_appended_and_the_engine_agrees_with_every_token(
    setting, tied_engine, monkeypatch
):
    """A random model never calls the tool, so the test inserts the calls. The rest is real."""

    def always_ask(sample):
        done = sample.response.count(environment.TOOL)
        ended = sample.status in (Status.COMPLETED, Status.TRUNCATED)
        return f"{sample.index}*7+{done}" if ended else None

    async def first_turns_are_short(args, sample, sampling_params):
        turn = sample.response.count(environment.TOOL)
        params = sampling_params | {"max_tokens": sample.response_length + 5 + turn}
        return await generate(args, sample, params)

    generate = environment.generate
    monkeypatch.setattr(environment, "find_call", always_ask)
    monkeypatch.setattr(environment, "generate", first_turns_are_short)
    args, source = setting(
        rollout={
            "max_response_len": 200,
            "custom_generate_path": f"{environment.__name__}.generate_with_calculator",
        },
        batch={"prompts": 2, "samples_per_prompt": 2},
    )
    output = generate_rollout(args, 0, source)
    tokenizer = load_tokenizer(args.hf_checkpoint)
    for sample in (s for group in output.samples for s in group):
        response = sample.tokens[sample.prompt_length :]
        assert sample.metadata["calls"] == 2
        first, second = (
            tokenizer(environment.OBSERVATION.format(sample.index * 7 + i))["input_ids"]
            for i in (0, 1)
        )
        assert len(response) == len(sample.loss_mask) == len(sample.rollout_log_probs)
        seen = [t for t, m in zip(response, sample.loss_mask, strict=True) if not m]
        assert seen == first + second
        written = sum(sample.loss_mask)
        assert 3 <= written <= 5 + 6 + 7
        scores = scored_by_the_engine(tied_engine.url, sample)
        own = [i for i, m in enumerate(sample.loss_mask) if m]
        assert [sample.rollout_log_probs[i] for i in own] == pytest.approx(
            [scores[i] for i in own], abs=1e-4
        )
        versions = zip(sample.weight_versions, sample.loss_mask, strict=True)
        assert all(v == UNKNOWN_VERSION for v, m in versions if not m)
    batch = build_train_batch(output.samples, args.config, 0)
    for sequence, sample in zip(
        batch.sequences, (s for group in output.samples for s in group), strict=True
    ):
        assert [bool(w) for w in sequence.weight] == [bool(m) for m in sample.loss_mask]

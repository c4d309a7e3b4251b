"""The installed vllm-router in front of fake engines: which engine answers which request."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import ExitStack

import pytest

from tests.unit.fake_engine import (
    FakeEngine,
    ids_of,
    make_config,
    write_prompts,
)
from vime.backends.vllm.router import Router
from vime.config.view import ArgsView
from vime.rollout.data_source import RolloutDataSourceWithBuffer
from vime.rollout.generation import generate
from vime.rollout.vllm_rollout import generate_rollout

NUM_TURNS = 3


async def in_three_turns(args, sample, sampling_params):
    for _ in range(NUM_TURNS):
        sample = await generate(args, sample, sampling_params)
        await asyncio.sleep(0.01)
    return sample


@pytest.mark.parametrize("function", [None, f"{__name__}.in_three_turns"])
def test_engines_have_equal_shares_and_each_sample_stays_with_one(hf, tmp_path, function):
    """Eight samples of the same prompt: the router can tell them apart only by their sessions."""
    pytest.importorskip("vllm_router", reason="needs vllm-router")
    prompts = write_prompts(tmp_path / "p.jsonl", 1)
    cfg = make_config(
        hf,
        data={"prompt_data": str(prompts), "input_key": "prompt", "label_key": "label"},
        batch={"prompts": 1, "samples_per_prompt": 8},
        rollout={"custom_generate_path": function},
        reward={"rm_type": "random"},
        log={"run_dir": str(tmp_path)},
    )
    router = Router(cfg)
    with ExitStack() as stack:
        answer = lambda prompt, params: (ids_of("1"), 0.05)  # noqa: E731
        engines = [stack.enter_context(FakeEngine(answer)) for _ in range(4)]
        urls = [engine.url for engine in engines]
        stack.callback(router.stop)
        host, port = router.start(urls).removeprefix("http://").split(":")
        args = ArgsView(
            cfg, vllm_engine_urls=tuple(urls), vllm_router_ip=host, vllm_router_port=int(port)
        )
        generate_rollout(args, 0, RolloutDataSourceWithBuffer(args))
    turns = NUM_TURNS if function else 1
    assert [Counter(engine.sessions) for engine in engines] == [
        dict.fromkeys(engine.sessions, turns) for engine in engines
    ]
    assert [len(set(engine.sessions)) for engine in engines] == [2, 2, 2, 2]

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
from tests.unit.test_addresses import HOSTS
from vime.backends.vllm.router import Router, address_in_args
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


@pytest.mark.parametrize("host", HOSTS)
def test_the_router_reaches_engines_and_is_reached_whatever_the_proxies(
    hf, tmp_path, monkeypatch, host
):
    pytest.importorskip("vllm_router", reason="needs vllm-router")
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    prompts = write_prompts(tmp_path / "p.jsonl", 2)
    cfg = make_config(
        hf,
        data={"prompt_data": str(prompts), "input_key": "prompt", "label_key": "label"},
        batch={"prompts": 2, "samples_per_prompt": 2},
        reward={"rm_type": "random"},
        log={"run_dir": str(tmp_path)},
    )
    router = Router(cfg, host=host)
    with ExitStack() as stack:
        engine = stack.enter_context(FakeEngine(lambda *_: (ids_of("1"), 0.0), host=host))
        stack.callback(router.stop)
        address = address_in_args(router.start([engine.url]))
        args = ArgsView(cfg, vllm_engine_urls=(engine.url,), **address)
        generate_rollout(args, 0, RolloutDataSourceWithBuffer(args))
    assert len(engine.log) == 4


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
        address = address_in_args(router.start(urls))
        args = ArgsView(cfg, vllm_engine_urls=tuple(urls), **address)
        generate_rollout(args, 0, RolloutDataSourceWithBuffer(args))
    turns = NUM_TURNS if function else 1
    assert [Counter(engine.sessions) for engine in engines] == [
        dict.fromkeys(engine.sessions, turns) for engine in engines
    ]
    assert [len(set(engine.sessions)) for engine in engines] == [2, 2, 2, 2]

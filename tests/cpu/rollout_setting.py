"""Fixtures for rollouts against the shared live engine behind a router. Import them by name."""

from __future__ import annotations

import pytest

from tests.unit.fake_engine import make_config, write_prompts
from vime.backends.vllm.router import Router, address_in_args
from vime.config.view import ArgsView
from vime.rollout.data_source import RolloutDataSourceWithBuffer

EVEN = "tests.cpu.rollout_setting.is_even"


async def is_even(args, sample, **kwargs):
    """A random reward, 0 or 1."""
    return float(sample.tokens[-1] % 2 == 0)


@pytest.fixture(scope="module")
def router(tied_engine):
    router = Router(tied_engine.cfg)
    yield router.start([tied_engine.url])
    router.stop()


@pytest.fixture
def setting(tied_engine, router, hf, tmp_path):
    """make(**sections) -> (args, data source): four groups of four samples with random rewards."""

    def make(**sections):
        prompts = write_prompts(tmp_path / "p.jsonl", 160)
        data = {"prompt_data": str(prompts), "input_key": "prompt", "apply_chat_template": True}
        sections["data"] = data | sections.get("data", {})
        sections["batch"] = {"prompts": 4, "samples_per_prompt": 4} | sections.get("batch", {})
        sections["reward"] = {"custom_rm_path": EVEN} | sections.get("reward", {})
        args = ArgsView(
            make_config(hf, **sections),
            vllm_engine_urls=(tied_engine.url,),
            **address_in_args(router),
        )
        return args, RolloutDataSourceWithBuffer(args)

    return make

"""Commands that only print import no library that takes seconds to import."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.unit.fake_engine import write_prompts

ROOT = Path(__file__).parents[2]
SLOW = ("torch", "ray", "transformers", "vllm", "vllm_router", "megatron", "pandas", "aiohttp")
SPEAK = """
import json, runpy, sys
{how}
print(json.dumps(sorted(sys.modules)))
"""
RUN = """
try:
    {call}
except SystemExit as end:
    print(end.code)
"""
PLAN = "runpy.run_module('vime', run_name='__main__')"


def imported_by(call: str, words: list[str]) -> tuple[int, str, list[str]]:
    """(exit code, output, slow libraries that were imported) of a program."""
    code = SPEAK.format(how=f"sys.argv = {['x', *words]!r}\n" + RUN.format(call=call))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    *_, end, modules = done.stdout.splitlines()
    found = {name.split(".")[0] for name in json.loads(modules)}
    return int(end), done.stdout + done.stderr, sorted(found & set(SLOW))


def program(name: str) -> str:
    return f"runpy.run_path({name!r}, run_name='__main__')"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (program("train.py"), ["--help"]),
        (program("train_async.py"), ["--help"]),
        (PLAN, ["plan", "--help"]),
        (PLAN, ["--help"]),
    ],
)
def test_help_imports_nothing_slow(call, words):
    end, said, slow = imported_by(call, words)
    assert (end, slow) == (0, [])
    assert "usage: " in said


def test_the_refusal_of_a_flag_imports_nothing_slow(tmp_path):
    """Even if everything else is right: model, weights, prompts, filter and engines are checked."""
    config = (ROOT / "tests/unit/hf_configs/qwen3-4B.json").read_text()
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    save_file({"w": np.zeros(1, dtype=np.float32)}, tmp_path / "model.safetensors")
    prompts = write_prompts(tmp_path / "q.jsonl", 2)
    words = (
        f"--hf-checkpoint {tmp_path} --prompt-data {prompts} --input-key prompt --label-key label "
        "--num-rollout 1 --rollout-batch-size 8 --rm-type deepscaler --actor-num-gpus-per-node 1 "
        "--rollout-num-gpus 1 --vllm-gpu-memory-utilization 0.7 --dynamic-sampling-filter-path "
        "vime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std --lrr 1e-6"
    )
    end, said, slow = imported_by(program("train.py"), words.split())
    assert (end, slow) == (2, [])
    assert "1 problem in the configuration" in said
    assert "--lrr 1e-6 is not a known flag. Did you mean --lr?" in said

"""When memory runs out, the message names a flag, its value and a value that helps."""

import re

import pytest
import torch

from tests.unit.test_memory import planned
from vime.backends.megatron.memory.in_use import memory_remedy
from vime.backends.vllm.out_of_memory import engine_remedy
from vime.errors import ConfigError
from vime.plan.out_of_memory import trainer_remedy
from vime.plan.trainer_memory import trainer_memory

GIB = 2**30


def suggested_tokens(text: str) -> int:
    return int(re.search(r"--max-tokens-per-gpu \d+ -> (\d+)", text)[1])


def test_a_number_of_tokens_that_fits_is_suggested(tmp_path):
    cfg, shape = planned(tmp_path, tokens=32768, tensor_model_parallel_size="2")
    text = trainer_remedy(cfg, 2, longest=4096, limit=79 * GIB)
    tokens = suggested_tokens(text)
    assert "--max-tokens-per-gpu 32768 -> " in text
    assert 8192 < tokens < 32768
    assert trainer_memory(cfg, shape, 2, tokens).peak <= 0.95 * 79 * GIB
    assert "--recompute-granularity full" in text
    assert "--tensor-model-parallel-size 2 -> 4" in text


def test_a_suggestion_is_below_an_estimate_that_was_too_low(tmp_path):
    cfg, _ = planned(tmp_path, tokens=32768, tensor_model_parallel_size="2")
    assert suggested_tokens(trainer_remedy(cfg, 2, longest=1, limit=1000 * GIB)) < 32768


def test_a_long_sequence_is_named(tmp_path):
    cfg, _ = planned(tmp_path, tokens=4096, tensor_model_parallel_size="2")
    text = trainer_remedy(cfg, 2, longest=32768, limit=79 * GIB)
    assert "a sequence of 32,768 tokens on one GPU is more than the " in text
    assert "--context-parallel-size 1 -> 2" in text


def test_state_that_alone_is_too_large_is_sharded(tmp_path):
    cfg, _ = planned(tmp_path, name="qwen3-8B")
    text = trainer_remedy(cfg, 2, longest=1024, limit=79 * GIB)
    assert "--max-tokens-per-gpu" not in text
    assert "--use-distributed-optimizer (estimated peak" in text


def test_torchs_error_becomes_a_config_error(tmp_path):
    cfg, _ = planned(tmp_path, tokens=65536)
    with pytest.raises(ConfigError, match="--max-tokens-per-gpu 65536 -> "), memory_remedy(cfg, 64):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_an_engine_that_found_too_little_free_memory(tmp_path):
    cfg, _ = planned(tmp_path, vllm_gpu_memory_utilization="0.9")
    log = (
        "ValueError: Free memory on device cuda:0 (55.3/79.19 GiB) on startup is less than "
        "desired GPU memory utilization (0.9, 71.27 GiB). Decrease GPU memory utilization"
    )
    assert "--vllm-gpu-memory-utilization 0.9 -> 0.68" in engine_remedy(cfg, log)


def test_an_engine_without_room_for_one_sequence(tmp_path):
    cfg, _ = planned(tmp_path, vllm_gpu_memory_utilization="0.2")
    log = (
        "ValueError: To serve at least one request with the model's max seq len (40960), "
        "(4.37 GiB KV cache is needed, which is larger than the available KV cache memory "
        "(2.12 GiB). Based on the available memory, the estimated maximum model length is 19824. "
    )
    text = engine_remedy(cfg, log)
    assert "2.25 GiB more KV cache" in text
    assert "raise --vllm-gpu-memory-utilization 0.2, or give --vllm-max-model-len 19824" in text
    cfg, _ = planned(tmp_path, vllm_kv_cache_memory_bytes="2276332666")
    text = engine_remedy(cfg, log)
    assert "raise --vllm-kv-cache-memory-bytes 2276332666 -> 4703911936, or give" in text
    text = engine_remedy(cfg, "OutOfMemoryError")
    assert "lower --vllm-kv-cache-memory-bytes 2276332666, --vllm-max-num-seqs or" in text


def test_an_engine_log_without_a_memory_problem_has_no_remedy(tmp_path):
    cfg, _ = planned(tmp_path)
    assert engine_remedy(cfg, "ValueError: unknown architecture") is None


def test_an_engine_whose_weights_fill_the_gpu(tmp_path):
    cfg, _ = planned(tmp_path)
    assert "--rollout-num-gpus-per-engine 1 -> 2" in engine_remedy(
        cfg, "ValueError: No available memory for the cache blocks. Try increasing"
    )
    assert "lower --vllm-gpu-memory-utilization" in engine_remedy(cfg, "CUDA out of memory")

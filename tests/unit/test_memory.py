"""The memory estimate: its formulas computed by hand, under several layouts and recomputation."""

import json
from pathlib import Path

import pytest

from tests.unit.command_lines import QWEN3_TINY, words, write_checkpoint
from vime.backends.megatron.hf.registry import architecture
from vime.cli import parse_config
from vime.data.packing import sequence_cost
from vime.plan.engine_memory import engine_parts
from vime.plan.shape import Shape, shape_of
from vime.plan.trainer_memory import largest_tokens, trainer_memory

HF_CONFIGS = Path(__file__).parent / "hf_configs"
BILLIONS = {  # as the publishers state them
    "deepseek-v3": 671.0,
    "glm4-9B": 9.40,
    "llama3.1-8B": 8.03,
    "moonlight": 15.96,
    "qwen2.5-0.5B": 0.494,
    "qwen2.5-7B": 7.62,
    "qwen3-0.6B": 0.596,
    "qwen3-1.7B": 1.72,
    "qwen3-4B": 4.02,
    "qwen3-30B-A3B": 30.53,
    "qwen3-235B-A22B": 235.1,
    "smollm2-135M": 0.1345,
}
MOE_TINY = QWEN3_TINY | {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2}
FULL = {
    "--recompute-granularity": "full",
    "--recompute-method": "uniform",
    "--recompute-num-layers": "1",
}
BLOCK = FULL | {"--recompute-method": "block", "--recompute-num-layers": "9"}


def config_of(name: str) -> dict:
    return json.loads((HF_CONFIGS / f"{name}.json").read_text())


def planned(folder, name="qwen3-4B", tokens=1024, **changes):
    """(config, shape) of a run on 8 GPUs. `changes` are flags, with underscores for dashes."""
    flags = {f"--{k.replace('_', '-')}": v for k, v in changes.items()}
    checkpoint = write_checkpoint(folder / name, **config_of(name))
    fixed = {
        "--hf-checkpoint": str(checkpoint),
        "--use-dynamic-batch-size": None,
        "--max-tokens-per-gpu": str(tokens),
        "--rollout-max-response-len": "100",
    }
    cfg = parse_config(words(folder, fixed | flags))
    return cfg, shape_of(cfg)


def bytes_of(folder, **changes) -> dict[str, float]:
    cfg, shape = planned(folder, **changes)
    memory = trainer_memory(cfg, shape, 2)
    parts = {p.name: p.num_bytes for p in [*memory.held, *memory.passing]}
    return parts | {"peak": memory.peak, "phase": memory.phase}


@pytest.mark.parametrize("name", BILLIONS)
def test_parameters_are_those_of_the_published_model(name):
    count = Shape.of(architecture(config_of(name))).parameters
    assert count / 1e9 == pytest.approx(BILLIONS[name], rel=2e-3)


def test_experts_are_counted_separately():
    moe = MOE_TINY | {"moe_intermediate_size": 64}
    assert Shape.of(architecture(moe)).routed == 8 * 3 * 128 * 64


def test_a_step_takes_six_operations_per_weight_and_token_and_those_of_attention():
    """QWEN3_TINY: h 128, q and kv 128, f 384, 3 layers, tied vocabulary of 288."""
    dense = Shape.of(architecture(QWEN3_TINY))
    pairs = (100**2 + 300**2) / 2
    attention = 6 * 3 * (128 + 128) * pairs
    assert dense.training_flops([100, 300]) == 6 * dense.parameters * 400 + attention
    untied = Shape.of(architecture(QWEN3_TINY | {"tie_word_embeddings": False}))
    assert untied.training_flops([100, 300]) == dense.training_flops([100, 300])
    moe = Shape.of(architecture(MOE_TINY | {"moe_intermediate_size": 192}))
    router = 6 * 3 * 8 * 128 * 400
    assert moe.training_flops([100, 300]) == dense.training_flops([100, 300]) + router


def test_the_length_at_which_attention_takes_as_much_as_the_weights():
    """Qwen3-4B. Per layer 100.9M weights, norms of 2 x 2560 + 2 x 128, and a 36th of the output's
    389M and of the last norm; 4,096 attention columns."""
    weights = 2 * 2560 * (4096 + 1024) + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128
    output = (2560 + 2560 * 151936) / 36
    found = Shape.of(architecture(config_of("qwen3-4B"))).attention_equals_rest
    assert found == pytest.approx((weights + output) / 4096)


# The weights that a token meets, and the channels of keys and values, over all layers; by hand from
# the sizes in tests/unit/hf_configs.
MET_AND_CHANNELS = {
    # h 4096, q 4096, kv 1024, f 14336, 32 layers, vocabulary 128,256
    "llama3.1-8B": (
        32 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336 + 2 * 4096) + 4096 + 128256 * 4096,
        32 * 32 * 2 * 128,
    ),
    # h 2048, q 4096, kv 512, 8 of 128 experts of 768, 48 layers, vocabulary 151,936
    "qwen3-30B-A3B": (
        48 * (2 * 2048 * (4096 + 512) + 2 * 128 + 2 * 2048 + 128 * 2048 + 8 * 3 * 2048 * 768)
        + 2048
        + 151936 * 2048,
        48 * 32 * 2 * 128,
    ),
    # h 2048, 16 heads of 128 + 64 for keys and 128 for values, latent 512, vocabulary 163,840; one
    # dense layer of 11,264, 26 with 6 of 64 experts and 2 shared ones of 1,408
    "moonlight": (
        27
        * (
            2048 * 16 * (128 + 64)
            + 2048 * (512 + 64)
            + 512
            + 512 * 16 * (128 + 128)
            + 16 * 128 * 2048
            + 2 * 2048
        )
        + 3 * 2048 * 11264
        + 26 * (64 * 2048 + (6 + 2) * 3 * 2048 * 1408)
        + 2048
        + 163840 * 2048,
        27 * 16 * (128 + 64 + 128),
    ),
}


@pytest.mark.parametrize("name", MET_AND_CHANNELS)
def test_balancing_and_the_speed_of_training_count_the_same_operations(name):
    shape = Shape.of(architecture(config_of(name)))
    met, channels = MET_AND_CHANNELS[name]
    lengths = [1000, 30000]
    expected = 6 * (met * sum(lengths) + channels * sum(n * n for n in lengths) / 2)
    assert shape.training_flops(lengths) == pytest.approx(expected, rel=1e-9)
    short, long = (sequence_cost(n, shape.attention_equals_rest) for n in lengths)
    flops = [shape.training_flops([n]) for n in lengths]
    assert long / short == pytest.approx(flops[1] / flops[0], rel=1e-9)


def test_a_step_of_the_founding_recipe(tmp_path):
    """Qwen3-4B: h 2560, q 4096, kv 1024, f 9728, 36 layers, vocabulary 151,936."""
    found = bytes_of(tmp_path, tokens=16384, tensor_model_parallel_size="2", sequence_parallel=None)
    local = (151936 * 2560 + 36 * (2 * 2560 * 5120 + 256 + 2 * 2560 + 3 * 2560 * 9728)) / 2 + 2560
    assert found["weights"] == pytest.approx(2 * local)
    assert found["gradients"] == pytest.approx(4 * local)
    assert found["optimizer"] == pytest.approx(12 * local)
    values = (4 * 2560 + 3 * 4096 + 3 * 1024 + 3 * 9728) / 2
    statistics = 4 * (32 + 2) / 2
    assert found["activations"] == pytest.approx(16384 * 36 * (2 * values + statistics))
    assert found["logits"] == pytest.approx(16384 * (151936 / 2 + 2560) * 2)
    assert found["output matrix"] == pytest.approx(151936 * 2560 / 2 * 2)
    peak, phase = found.pop("peak"), found.pop("phase")
    assert phase == "the log-probabilities' backward"
    assert peak == pytest.approx(sum(found.values()))


def test_a_critic_is_the_model_again_with_a_value_in_place_of_logits(tmp_path):
    """Tied, on one stage: the same parameters and the head's 2560."""
    found = bytes_of(tmp_path, advantage_estimator="ppo")
    actor = found["weights"] + found["gradients"] + found["optimizer"]
    critic = found["critic"] + found["its gradients"]
    assert critic == pytest.approx(actor + 2560 * (2 + 4 + 12))


def test_the_distributed_optimizer_is_a_share(tmp_path):
    whole = bytes_of(tmp_path)
    shared = bytes_of(tmp_path, use_distributed_optimizer=None)
    assert shared["optimizer"] == pytest.approx(whole["optimizer"] / 8)
    assert shared["gradients"] == whole["gradients"]


def test_experts_follow_their_own_layout(tmp_path):
    """Qwen3-30B-A3B: 48 layers of 128 experts of 3 x 2048 x 768."""
    one = bytes_of(tmp_path, name="qwen3-30B-A3B")
    four = bytes_of(tmp_path, name="qwen3-30B-A3B", expert_model_parallel_size="4")
    routed = 48 * 128 * 3 * 2048 * 768
    assert one["weights"] - four["weights"] == pytest.approx(2 * routed * 3 / 4)
    shared = {"expert_model_parallel_size": "4", "use_distributed_optimizer": None}
    dense = one["weights"] / 2 - routed
    optimizer = bytes_of(tmp_path, name="qwen3-30B-A3B", **shared)["optimizer"]
    assert optimizer == pytest.approx(12 * (dense / 8 + routed / 4 / 2))


def flags(changes: dict) -> dict:
    return {name.lstrip("-").replace("-", "_"): value for name, value in changes.items()}


def test_recomputing_keeps_inputs_only(tmp_path):
    none = bytes_of(tmp_path, tokens=65536)["activations"]
    full = bytes_of(tmp_path, tokens=65536, **flags(FULL))["activations"]
    block = bytes_of(tmp_path, tokens=65536, **flags(BLOCK))["activations"]
    assert full == 65536 * 36 * 2 * 2560
    assert block == pytest.approx(9 / 36 * full + 27 / 36 * none)


@pytest.mark.parametrize(("module", "channels"), [("layernorm", 2 * 2560), ("mlp_act", 9728)])
def test_a_recomputed_module_is_not_kept(module, channels, tmp_path):
    selective = {"recompute_granularity": "selective", "recompute_modules": module}
    none = bytes_of(tmp_path, tokens=16384)["activations"]
    again = bytes_of(tmp_path, tokens=16384, **selective)["activations"]
    assert none - again == 16384 * 36 * 2 * channels


def test_recomputed_layers_can_be_the_peak(tmp_path):
    """36 layers recomputed at once need what they save."""
    at_once = FULL | {"--recompute-num-layers": "36"}
    found = bytes_of(tmp_path, tokens=16384, **flags(at_once))
    none = bytes_of(tmp_path, tokens=16384)
    assert found["phase"] == "the backward of recomputed layers"
    assert found["recomputed"] > none["activations"]


def test_the_fullest_stage_decides(tmp_path):
    """Of 36 layers, the first stage has 15; each of four equal stages would have 9."""
    even = bytes_of(tmp_path, tokens=16384, pipeline_model_parallel_size="4")
    uneven = bytes_of(
        tmp_path,
        tokens=16384,
        pipeline_model_parallel_size="4",
        decoder_first_pipeline_num_layers="15",
        decoder_last_pipeline_num_layers="3",
    )
    assert uneven["activations"] == pytest.approx(even["activations"] * 15 / 9)


def test_an_early_stage_holds_more_micro_batches(tmp_path):
    one = bytes_of(tmp_path, tokens=16384)
    four = bytes_of(tmp_path, tokens=16384, pipeline_model_parallel_size="4")
    assert four["activations"] == pytest.approx(one["activations"])  # a quarter of it, four times


@pytest.mark.parametrize(
    ("given", "per_parameter"),
    [
        ({"no_accumulate_allreduce_grads_in_fp32": None}, 4),
        ({"optimizer": "sgd", "weight_decay": "0.1"}, 4),
        ({"optimizer": "sgd", "no_accumulate_allreduce_grads_in_fp32": None}, 8),
    ],
)
def test_copies_of_gradients_can_be_the_peak(given, per_parameter, tmp_path):
    found = bytes_of(tmp_path, tokens=256, **given)
    assert found["phase"] == "the optimizer's step"
    assert found["temporary"] == per_parameter * found["weights"] / 2


def test_a_fused_adam_needs_no_temporary_memory(tmp_path):
    cfg, shape = planned(tmp_path, tokens=256)
    assert trainer_memory(cfg, shape, 2).phases["the optimizer's step"] == []


def test_the_suggested_number_of_tokens_fits(tmp_path):
    cfg, shape = planned(tmp_path, tokens=65536)
    room = 120 * 2**30
    tokens = largest_tokens(cfg, shape, 2, room)
    assert tokens % 256 == 0
    assert 1024 < tokens < 65536
    assert trainer_memory(cfg, shape, 2, tokens).peak <= room
    assert trainer_memory(cfg, shape, 2, tokens + 256).peak > room
    assert largest_tokens(cfg, shape, 2, 1 << 30) == 0


def test_an_engine_holds_weights_and_cache(tmp_path):
    cfg, shape = planned(tmp_path)
    weights, cache = engine_parts(cfg, shape, 2)
    assert weights.num_bytes == 2 * shape.parameters
    assert cache.num_bytes == 2 * 36 * 8 * 128 * 2 * (256 / 8) * 100  # 256 responses on 8 engines

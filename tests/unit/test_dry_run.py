"""`--dry-run` says what a configuration means and starts nothing. Its figures can be redone."""

import pytest

from tests.unit.command_lines import QWEN3_TINY, words, write_checkpoint
from vime.cli import parse_config
from vime.cli.memory import Shape, engine_parts, shape_of, trainer_parts

QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


def test_it_prints_and_exits_with_0(capsys, tmp_path):
    changes = {
        "--dry-run": None,
        "--colocate": None,
        "--num-steps-per-rollout": "2",
        "--tensor-model-parallel-size": "2",
        "--use-dynamic-batch-size": None,
        "--max-tokens-per-gpu": "9216",
        "--eps-clip": "0.3",
        "--vllm-enforce-eager": None,
        "--num-layers": "3",
    }
    with pytest.raises(SystemExit) as stopped:
        parse_config(words(tmp_path, changes))
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for line in (
        "--eps-clip-high 0.3",
        "--colocate on",
        "--vllm-enforce-eager on",
        "--num-layers 3",
        "32 prompts x 8 samples = 256 samples a rollout",
        "256 samples / 2 optimizer steps = 128 samples a step",
        "128 samples / 4 data-parallel ranks = 32 a rank and step",
        "a pack of up to 9,216 tokens",
        "3 rollouts x 2 steps = 6 optimizer steps over 768 samples",
        "trainer: 8 GPUs = TP 2 x PP 1 x CP 1 x DP 4",
        "engines: 8 of 1 GPUs each, the trainer's, in turn",
        "KV cache",
    ):
        assert line in text


def test_a_bad_configuration_is_refused_before_it_is_shown(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        parse_config(words(tmp_path, {"--dry-run": None, "--num-steps-per-rollout": "3"}))
    assert stopped.value.code == 2
    assert capsys.readouterr().out == ""


def test_an_unusual_architecture_is_shown_without_memory(capsys, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text('{"d_model": 64}')
    with pytest.raises(SystemExit):
        parse_config(words(tmp_path, {"--dry-run": None, "--hf-checkpoint": str(folder)}))
    assert f"unknown: {folder}/config.json does not name the usual sizes" in capsys.readouterr().out


def test_parameters_are_counted():
    assert Shape.of(QWEN3_4B).parameters == pytest.approx(4.022e9, rel=1e-3)


def test_experts_are_counted_apart():
    moe = QWEN3_TINY | {"num_experts": 8, "moe_intermediate_size": 64}
    assert Shape.of(moe).experts_per_layer == 8 * 3 * 128 * 64


def test_memory_follows_its_formulas(tmp_path):
    folder = write_checkpoint(tmp_path / "4b", **QWEN3_4B)
    cfg = parse_config(
        words(
            tmp_path,
            {
                "--hf-checkpoint": str(folder),
                "--tensor-model-parallel-size": "2",
                "--use-distributed-optimizer": None,
                "--use-dynamic-batch-size": None,
                "--max-tokens-per-gpu": "1000",
                "--rollout-max-response-len": "100",
            },
        )
    )
    shape = shape_of(cfg)
    local = (shape.embedding + 36 * shape.dense_per_layer) / 2
    parts = {p.name: p.num_bytes for p in trainer_parts(cfg, shape, 2)}
    assert parts["weights"] == 2 * local
    assert parts["gradients"] == 4 * local
    assert parts["optimizer"] == 12 * local / 4  # DP 4
    assert parts["activations"] == 1000 * 2 * 2560 * 36 * (12 / 2 + 5)
    assert parts["logits"] == 1000 * 151936 / 2 * (2 + 8)
    cache = engine_parts(cfg, shape, 2)[1].num_bytes
    assert cache == 2 * 36 * 8 * 128 * 2 * (256 / 8) * 100  # 256 responses on 8 engines

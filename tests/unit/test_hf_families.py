"""Model families: names, architecture, and the checks against config.json. No Megatron."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_families import TINY_MODELS
from tests.unit.qwen3_4b import QWEN3_4B, config_of
from vime.backends.megatron.hf.check import check_model_args, check_training
from vime.backends.megatron.hf.family import layer_pattern
from vime.backends.megatron.hf.registry import FAMILIES, architecture, family_for, model_args
from vime.errors import ConfigError
from vime.plan.shape import Shape


def test_every_weight_has_one_name_on_each_side() -> None:
    family = family_for(QWEN3_4B)
    weights = list(family.weights(family.megatron_args(QWEN3_4B)))
    names = [n for w in weights for n in w.hf]
    assert len(set(names)) == len(names) == 2 + 36 * 11
    assert "lm_head.weight" not in names  # tied
    untied = family.megatron_args(QWEN3_4B | {"tie_word_embeddings": False})
    assert "lm_head.weight" in [n for w in family.weights(untied) for n in w.hf]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_plan_counts_the_parameters_that_hugging_face_has(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY_MODELS[name]))
    counted = Shape.of(architecture(TINY_MODELS[name])).parameters
    assert counted == sum(p.numel() for p in model.parameters())


def test_the_file_of_a_family_is_named_after_its_model_type() -> None:
    for name, family in FAMILIES.items():
        assert family.megatron_args.__module__.endswith(f".families.{name}")


def test_mixture_layers_follow_the_config() -> None:
    moe = QWEN3_4B | {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 3,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    }
    family = family_for(moe)
    names = [n for w in family.weights(family.megatron_args(moe)) for n in w.hf]
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in names
    assert "model.layers.1.mlp.up_proj.weight" in names
    assert "model.layers.1.mlp.gate.weight" not in names


def test_layer_patterns_mean_what_they_mean_to_megatron() -> None:
    assert layer_pattern("([0]*1+[1]*3)", 4) == [0, 1, 1, 1]
    assert layer_pattern("[0,1]*2", 4) == [0, 1, 0, 1]
    assert layer_pattern(2, 4) == [1, 0, 1, 0]
    with pytest.raises(ValueError, match="not a pattern"):
        layer_pattern("__import__('os')", 4)


def test_model_args_that_contradict_the_config_are_named_with_both_values(tmp_path: Path) -> None:
    args = {"rotary_base": 10000.0, "num_layers": 36, "swiglu": True, "norm_epsilon": 1e-5}
    problems = check_model_args(config_of(tmp_path, QWEN3_4B, model={"args": args}))
    assert len(problems) == 2
    assert any("--rotary-base 10000.0" in p and "1000000" in p for p in problems)
    assert all("--override-model-config" in p for p in problems)
    cfg = config_of(tmp_path, QWEN3_4B, model={"args": args, "override": True})
    assert check_model_args(cfg) == []
    assert model_args(cfg)["rotary_base"] == 10000.0


def test_an_unreadable_pattern_of_expert_layers_is_refused(tmp_path: Path) -> None:
    moe = TINY_MODELS["Qwen3-MoE"]
    model = {"args": {"moe_layer_freq": "every second"}, "override": True}
    (problem,) = check_model_args(config_of(tmp_path, moe, model=model))
    assert problem.startswith("--moe-layer-freq: 'every second' is not a pattern such as")


def test_a_size_that_config_json_lacks_is_named(tmp_path: Path) -> None:
    config = {name: value for name, value in QWEN3_4B.items() if name != "intermediate_size"}
    (problem,) = check_model_args(config_of(tmp_path, config))
    assert problem == f"--hf-checkpoint {tmp_path}: config.json lacks 'intermediate_size'."


def test_a_layout_that_does_not_divide_the_model_is_refused(tmp_path: Path) -> None:
    cfg = config_of(tmp_path, QWEN3_4B, parallel={"tp": 16, "pp": 5, "ep": 2})
    text = " ".join(check_model_args(cfg))
    for part in ("16 does not divide the model's 8 key/value heads", "36 layers", "no experts"):
        assert part in text


@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        ({"pp": 6}, ""),
        ({"pp": 5, "first_stage_layers": 4}, ""),
        ({"pp": 5, "first_stage_layers": 7, "last_stage_layers": 5}, ""),
        ({"pp": 2, "first_stage_layers": 20, "last_stage_layers": 16}, ""),
        ({"pp": 4, "vpp": 3}, ""),
        ({"pp": 5, "first_stage_layers": 4, "vpp": 4}, ""),
        (
            {"pp": 5},
            "--pipeline-model-parallel-size 5 does not divide the model's 36 layers. Choose a "
            "divisor of 36, or give --decoder-first-pipeline-num-layers or "
            "--decoder-last-pipeline-num-layers of its own.",
        ),
        (
            {"pp": 5, "last_stage_layers": 5},
            "--decoder-last-pipeline-num-layers 5: the 31 layers that are left do not divide among "
            "4 other pipeline stages. Change the numbers of layers.",
        ),
        (
            {"pp": 2, "first_stage_layers": 36},
            "--decoder-first-pipeline-num-layers 36: of the model's 36 layers, 0 are left for 1 "
            "other pipeline stages. Change the numbers of layers.",
        ),
        (
            {"pp": 2, "first_stage_layers": 20, "last_stage_layers": 15},
            "--decoder-first-pipeline-num-layers 20 and --decoder-last-pipeline-num-layers 15: of "
            "the model's 36 layers, 1 are left for 0 other pipeline stages. Change the numbers of "
            "layers.",
        ),
        (
            {"pp": 4, "vpp": 2},
            "--virtual-pipeline-model-parallel-size 2 does not divide the 9 layers of a pipeline "
            "stage. Choose a divisor of 9.",
        ),
        (
            {"pp": 4, "layers_per_virtual_stage": 2},
            "--num-layers-per-virtual-pipeline-stage 2 does not divide the 9 layers of a pipeline "
            "stage. Choose a divisor of 9.",
        ),
    ],
)
def test_the_layers_fit_the_pipeline(layout: dict, problem: str, tmp_path: Path) -> None:
    found = check_model_args(config_of(tmp_path, QWEN3_4B, parallel=layout))
    assert found == ([problem] if problem else [])


def test_stages_that_are_not_given_share_the_other_layers(tmp_path: Path) -> None:
    def stages(layers: int, **layout: int) -> list[int]:
        return config_of(tmp_path, QWEN3_4B, parallel=layout).parallel.stage_layers(layers)

    assert stages(36, pp=4) == [9, 9, 9, 9]
    assert stages(61, pp=4, last_stage_layers=13) == [16, 16, 16, 13]
    assert stages(94, pp=4, first_stage_layers=23, last_stage_layers=23) == [23, 24, 24, 23]
    assert stages(5, pp=2, first_stage_layers=3, last_stage_layers=2) == [3, 2]


@pytest.mark.parametrize(
    ("args", "override", "problem"),
    [
        ({"moe_router_dtype": "fp32"}, False, "--moe-router-dtype fp32 describes a part that"),
        ({"q_lora_rank": 8}, True, "--q-lora-rank 8 describes a part that"),
        ({"num_experts": 8}, False, "--num-experts 8 describes a part that"),
        ({"rope_scaling_factor": 4.0}, False, "--rope-scaling-factor 4.0 describes a part that"),
        ({"beta_fast": 32.0}, True, "--beta-fast 32.0 describes a part that"),
        ({"normalization": "LayerNorm"}, True, "--normalization LayerNorm: vime builds RMSNorm"),
        ({"position_embedding_type": "none"}, True, "none: vime builds rope only. Leave it out."),
        ({"make_vocab_size_divisible_by": 128}, False, ""),
        ({"moe_router_topk_scaling_factor": 1.0}, False, ""),
    ],
)
def test_model_args_that_would_change_nothing_or_another_model_are_refused(
    args: dict[str, Any], override: bool, problem: str, tmp_path: Path
) -> None:
    model = {"args": args, "override": override}
    found = check_model_args(config_of(tmp_path, QWEN3_4B, model=model))
    assert [p for p in found if problem in p] if problem else not found, found


def test_settings_that_megatron_refuses_late_or_ignores_are_refused_at_the_start(
    tmp_path: Path,
) -> None:
    moe = QWEN3_4B | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}
    moe |= {"moe_intermediate_size": 18, "norm_topk_prob": True}

    def problems(tp: int = 1, modules: list[str] | None = None, **args: Any) -> str:
        selective = {"recompute_granularity": "selective", "recompute_modules": modules}
        layout = {"tp": tp, "etp": tp} | (selective if modules else {})
        cfg = config_of(tmp_path, moe, parallel=layout, model={"args": args})
        return " ".join([*check_model_args(cfg), *check_training(cfg)])

    assert problems(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.1) == ""
    assert problems(moe_aux_loss_coeff=0.0) == ""
    assert "Add --sequence-parallel." in problems(2)
    assert "size 4 does not divide the model's 18 channels of an expert" in problems(4)
    assert "coeff 0.1 has no effect" in problems(moe_aux_loss_coeff=0.1)
    assert "type sinkhorn is not supported. Choose one of" in problems(
        moe_router_load_balancing_type="sinkhorn"
    )
    assert "mla_up_proj: the model has no latent attention" in problems(modules=["mla_up_proj"])


def test_unknown_families_and_rope_scaling_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="qwen3_moe"):
        family_for({"model_type": "mystery"})
    scaled = QWEN3_4B | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    assert "yarn" in check_model_args(config_of(tmp_path / "a", scaled))[0]
    assert check_model_args(config_of(tmp_path / "none")) == []  # `checkpoint_is_there` reports it


def test_a_router_that_the_engine_would_read_as_another_kind_is_refused(tmp_path: Path) -> None:
    published = json.loads((Path(__file__).parent / "hf_configs" / "moonlight.json").read_text())
    assert check_model_args(config_of(tmp_path / "a", published)) == []
    lost = {k: v for k, v in published.items() if k != "scoring_func"}
    (problem,) = check_model_args(config_of(tmp_path / "b", lost))
    assert "scoring_func None in config.json is not supported" in problem
    assert 'has scoring_func "sigmoid": add it' in problem

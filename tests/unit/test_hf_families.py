"""HF names, layouts and config checks, without Megatron."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from safetensors.torch import save_file

from tests.tiny_families import TINY_MODELS
from vime.backends.megatron.checkpoints.commit import (
    TRACKER,
    commit_checkpoint,
    iteration_folder,
)
from vime.backends.megatron.checkpoints.retention import delete_old_checkpoints
from vime.backends.megatron.checkpoints.start import check_start, resolve
from vime.backends.megatron.hf.check import check_model_args, check_training
from vime.backends.megatron.hf.family import Kind, layer_pattern
from vime.backends.megatron.hf.registry import FAMILIES, architecture, family_for, model_args
from vime.backends.megatron.weights.files import HFFiles
from vime.backends.megatron.weights.layout import Dims, hf_shapes, shard, unshard
from vime.backends.megatron.weights.load import load_hf_weights
from vime.config import Config
from vime.errors import CheckpointError, ConfigError
from vime.plan.shape import Shape

QWEN3_4B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
}
DIMS = Dims(heads=4, groups=2, channels=3, vocab=7)


def config(folder: Path, hf_config: dict[str, Any] | None = None, **sections: Any) -> Config:
    if hf_config is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(hf_config))
    needed = {"model": {"hf_checkpoint": str(folder)}, "batch": {"prompts": 1}}
    types = get_type_hints(Config)
    return Config(
        **{
            f.name: types[f.name](**(needed.get(f.name, {}) | sections.get(f.name, {})))
            for f in fields(Config)
        }
    )


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("kind", Kind)
def test_sharding_then_joining_gives_the_tensors_back(kind: Kind, num_ranks: int) -> None:
    rows = {Kind.VOCAB: 4, Kind.QKV: 24 // num_ranks}.get(kind, 8) if num_ranks > 1 else 7
    rows = {Kind.QKV: 24 // num_ranks, Kind.GLU: 8}.get(kind, rows)
    shapes = hf_shapes(kind, (rows, 5), num_ranks, DIMS)
    full = [torch.randn(shape) for shape in shapes]
    shards = [shard(kind, full, rank, num_ranks, DIMS, rows) for rank in range(num_ranks)]
    assert all(s.shape == (rows, 5) for s in shards)
    for tensor, back in zip(full, unshard(kind, shards, DIMS), strict=True):
        assert torch.equal(tensor, back)


def test_query_key_value_are_interleaved_by_group() -> None:
    dims = Dims(heads=4, groups=2, channels=1, vocab=0)
    q, k, v = torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6]), torch.tensor([7, 8])
    merged = shard(Kind.QKV, [q, k, v], 0, 1, dims, 8)
    assert merged.tolist() == [1, 2, 5, 7, 3, 4, 6, 8]


def test_padded_vocabulary_rows_are_zero_and_cut_off_again() -> None:
    table = torch.ones(7, 2)
    last = shard(Kind.VOCAB, [table], 1, 2, DIMS, 4)
    assert last.tolist() == [[1, 1], [1, 1], [1, 1], [0, 0]]
    assert len(unshard(Kind.VOCAB, [table[:4], last], DIMS)[0]) == 7


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


def test_the_file_of_a_family_bears_its_model_type() -> None:
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


def test_layer_patterns_read_as_megatron_writes_them() -> None:
    assert layer_pattern("([0]*1+[1]*3)", 4) == [0, 1, 1, 1]
    assert layer_pattern("[0,1]*2", 4) == [0, 1, 0, 1]
    assert layer_pattern(2, 4) == [1, 0, 1, 0]
    with pytest.raises(ValueError, match="not a pattern"):
        layer_pattern("__import__('os')", 4)


def test_model_args_that_contradict_the_config_are_named_with_both_values(tmp_path: Path) -> None:
    args = {"rotary_base": 10000.0, "num_layers": 36, "swiglu": True, "norm_epsilon": 1e-5}
    problems = check_model_args(config(tmp_path, QWEN3_4B, model={"args": args} | given(tmp_path)))
    assert len(problems) == 2
    assert any("--rotary-base 10000.0" in p and "1000000" in p for p in problems)
    assert all("--override-model-config" in p for p in problems)
    over = {"args": args, "override": True} | given(tmp_path)
    cfg = config(tmp_path, QWEN3_4B, model=over)
    assert check_model_args(cfg) == []
    assert model_args(cfg)["rotary_base"] == 10000.0


def given(folder: Path) -> dict[str, Any]:
    return {"hf_checkpoint": str(folder)}


def test_a_layout_that_does_not_divide_the_model_is_refused(tmp_path: Path) -> None:
    cfg = config(tmp_path, QWEN3_4B, parallel={"tp": 16, "pp": 5, "ep": 2})
    text = " ".join(check_model_args(cfg))
    for part in ("16 does not divide the model's 8 key/value heads", "36 layers", "no experts"):
        assert part in text


def test_what_megatron_refuses_late_or_leaves_out_is_told_before(tmp_path: Path) -> None:
    moe = QWEN3_4B | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}
    moe |= {"moe_intermediate_size": 18, "norm_topk_prob": True}

    def told(tp: int = 1, modules: list[str] | None = None, **args: Any) -> str:
        selective = {"recompute_granularity": "selective", "recompute_modules": modules}
        layout = {"tp": tp, "etp": tp} | (selective if modules else {})
        cfg = config(tmp_path, moe, parallel=layout, model={"args": args} | given(tmp_path))
        return " ".join([*check_model_args(cfg), *check_training(cfg)])

    assert told(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.1) == ""
    assert told(moe_aux_loss_coeff=0.0) == ""
    assert "Add --sequence-parallel." in told(2)
    assert "size 4 does not divide the model's 18 channels of an expert" in told(4)
    assert "coeff 0.1 has no effect" in told(moe_aux_loss_coeff=0.1)
    assert "type sinkhorn is not supported. Choose one of" in told(
        moe_router_load_balancing_type="sinkhorn"
    )
    assert "mla_up_proj: the model has no latent attention" in told(modules=["mla_up_proj"])


def test_unknown_families_and_rope_scaling_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="qwen3_moe"):
        family_for({"model_type": "mystery"})
    scaled = QWEN3_4B | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    assert "yarn" in check_model_args(config(tmp_path / "a", scaled))[0]
    assert check_model_args(config(tmp_path / "none")) == []  # told by checkpoint_is_there


def test_a_router_that_the_engine_would_take_for_another_is_refused(tmp_path: Path) -> None:
    published = json.loads((Path(__file__).parent / "hf_configs" / "moonlight.json").read_text())
    assert check_model_args(config(tmp_path / "a", published)) == []
    lost = {k: v for k, v in published.items() if k != "scoring_func"}
    (problem,) = check_model_args(config(tmp_path / "b", lost))
    assert "scoring_func None in config.json is not supported" in problem
    assert 'has scoring_func "sigmoid": add it' in problem


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    small = QWEN3_4B | {"num_hidden_layers": 1, "hidden_size": 4, "vocab_size": 8}
    cfg = config(tmp_path, small)
    family = family_for(small)
    names = [n for w in family.weights(model_args(cfg)) for n in w.hf]
    tensors = {n: torch.zeros(1) for n in names}

    def failure(found: dict[str, torch.Tensor]) -> str:
        save_file(found, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError) as error:
            load_hf_weights([], tmp_path, cfg)
        return str(error.value)

    assert names[3] in failure({n: t for n, t in tensors.items() if n != names[3]})
    assert "model.safetensors: unexpected tensor extra" in failure(
        tensors | {"extra": torch.zeros(1)}
    )
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_hf_weights([], tmp_path, cfg)


def test_shards_that_are_cut_off_missing_or_lack_a_tensor_are_named(tmp_path: Path) -> None:
    first, second = (tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    save_file({"a": torch.zeros(64)}, first)
    save_file({"b": torch.zeros(64)}, second)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": first.name, "b": second.name}}))
    assert HFFiles(tmp_path).file_of == {"a": first.name, "b": second.name}

    def refused() -> str:
        with pytest.raises(CheckpointError) as error:
            HFFiles(tmp_path)
        return str(error.value)

    whole = second.read_bytes()
    second.write_bytes(whole[:-1])
    assert f"{second} cannot be read" in refused()
    assert "Download it again" in refused()
    second.unlink()
    assert f"{second} is missing, but model.safetensors.index.json names it" in refused()
    save_file({"c": torch.zeros(64)}, second)
    assert f"{second} lacks tensor b, which model.safetensors.index.json promises" in refused()
    index.write_text("{}")
    assert f"{index} is damaged" in refused()


def test_a_run_starts_from_the_first_folder_that_holds_weights(tmp_path: Path) -> None:
    load, ref, model = tmp_path / "load", tmp_path / "ref", tmp_path / "hf"
    config(model, QWEN3_4B)
    iteration_folder(ref, None).mkdir(parents=True)
    commit_checkpoint(ref, None)

    def start(step: int | None = None, *, ref: Path | None = ref) -> tuple[str, int]:
        found = resolve(str(load), str(ref) if ref else None, str(model), step)
        return found.folder.name, found.rollout_id

    assert start() == ("release", 0)
    assert start(ref=None) == ("hf", 0)
    iteration_folder(load, 19).mkdir(parents=True)
    assert start() == ("release", 0), "without a tracker nothing was committed"
    commit_checkpoint(load, 19)
    assert start() == ("iter_0000019", 20)
    iteration_folder(load, 39).mkdir()
    commit_checkpoint(load, 39)
    assert start() == ("iter_0000039", 40)
    assert start(19) == ("iter_0000019", 20)
    with pytest.raises(CheckpointError, match="iter_0000007, which does not exist"):
        start(7)
    assert resolve(None, str(model)).is_hf
    assert (load / TRACKER).read_text() == "39"
    with pytest.raises(CheckpointError, match="holds neither"):
        resolve(None, str(tmp_path / "nothing"))


def test_a_start_that_cannot_be_is_told_before_anything_runs(tmp_path: Path) -> None:
    empty, model = tmp_path / "empty", tmp_path / "hf"
    empty.mkdir()

    def problems(*, plan: bool = False, **files: Any) -> list[str]:
        return check_start(
            config(
                model,
                QWEN3_4B,
                checkpoint=files,
                debug={"dry_run": plan},
                algorithm={"use_kl_loss": True},
            )
        )

    (no_weights,) = problems()
    assert no_weights.startswith(f"--hf-checkpoint {model}: {model} holds no *.safetensors file.")
    assert problems(plan=True) == []
    save_file({"a": torch.zeros(1)}, model / "model.safetensors")
    assert problems() == problems(load=str(empty)) == []
    (wrong,) = problems(ref_load=str(empty))
    assert wrong.startswith(f"--ref-load {empty} holds neither a checkpoint")
    iteration_folder(empty, 3).mkdir()
    commit_checkpoint(empty, 3)
    assert problems(load=str(empty)) == []
    assert "iter_0000007, which does not exist" in problems(load=str(empty), ckpt_step=7)[0]


def test_a_teacher_that_cannot_be_loaded_is_told_before_anything_runs(tmp_path: Path) -> None:
    model, teacher = tmp_path / "hf", tmp_path / "teacher"
    cfg = config(
        model,
        QWEN3_4B,
        checkpoint={"opd_teacher_load": str(teacher)},
        algorithm={"use_opd": True},
    )
    teacher.mkdir()
    save_file({"a": torch.zeros(1)}, model / "model.safetensors")
    (neither,) = check_start(cfg)
    assert neither.startswith(f"--opd-teacher-load {teacher} holds neither a checkpoint")
    (teacher / "config.json").write_text(json.dumps(QWEN3_4B))
    (no_weights,) = check_start(cfg)
    assert no_weights.startswith(f"--opd-teacher-load {teacher}: {teacher} holds no *.safetensors")
    save_file({"a": torch.zeros(1)}, teacher / "model.safetensors")
    assert check_start(cfg) == []


OTHER_MODELS = {
    "another rotary base, which no weight's shape tells": (
        {"rope_theta": 5000000},
        "rotary_base 5000000, not 1000000",
    ),
    "fewer layers and words": (
        {"num_hidden_layers": 28, "vocab_size": 97},
        "num_layers 28, not 36; vocab_size 97, not 151936",
    ),
    "another family": ({"model_type": "llama"}, "model_type llama, not qwen3"),
    "more positions": ({"max_position_embeddings": 262144}, None),
}


@pytest.mark.parametrize("case", OTHER_MODELS)
@pytest.mark.parametrize("flag", ["--load", "--ref-load", "--opd-teacher-load"])
def test_weights_of_another_architecture_are_refused(tmp_path: Path, case: str, flag: str) -> None:
    changes, difference = OTHER_MODELS[case]
    hf, other = tmp_path / "hf", tmp_path / "other"
    for folder, its in ((hf, QWEN3_4B), (other, QWEN3_4B | changes)):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(its))
        save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    files = {"opd_teacher_load": str(hf)} | {flag[2:].replace("-", "_"): str(other)}
    algorithm = {"use_opd": True, "use_kl_loss": True}
    assert check_start(config(hf, checkpoint=files, algorithm=algorithm)) == (
        []
        if difference is None
        else [
            f"{flag} {other}: the weights are of another architecture than --hf-checkpoint {hf} "
            f"describes: {difference}. Choose weights of the same, or correct --hf-checkpoint."
        ]
    )


def test_old_checkpoints_go_and_the_committed_one_stays(tmp_path: Path) -> None:
    for iteration in (3, 9, 12, 100):
        iteration_folder(tmp_path, iteration).mkdir()
        (iteration_folder(tmp_path, iteration) / "file").touch()
    iteration_folder(tmp_path, None).mkdir()

    def left(keep_last: int | None, latest: int | None) -> list[str]:
        commit_checkpoint(tmp_path, latest)
        delete_old_checkpoints(tmp_path, keep_last)
        return sorted(p.name[-3:] for p in tmp_path.iterdir() if p.name != TRACKER)

    everything = ["003", "009", "012", "100", "ase"]
    assert left(None, 12) == everything
    assert left(1, None) == everything, "release: nothing is counted"
    assert left(2, 12) == ["009", "012", "100", "ase"], "100 comes after the committed one"
    assert left(1, 9) == ["009", "012", "100", "ase"]
    assert left(1, 100) == ["100", "ase"]

"""Every shipped recipe parses, and every model script agrees with the model that it names."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.unit.command_lines import QWEN3_TINY, write_checkpoint, write_prompts
from vime.backends.megatron.hf.check import check_model_args, check_training
from vime.backends.megatron.hf.registry import architecture
from vime.cli import parse_config, parse_convert_config

SCRIPTS = Path(__file__).parents[2] / "scripts"
RECIPES = sorted(SCRIPTS.glob("run-*.sh"))
MODELS = sorted((SCRIPTS / "models").glob("*.sh"))

HF_CONFIGS = Path(__file__).parent / "hf_configs"  # the published config.json files
CONFIGS = {path.stem: json.loads(path.read_text()) for path in HF_CONFIGS.glob("*.json")}
CONFIGS["qwen3-tiny"] = QWEN3_TINY
# Values that scripts leave to config.json: for no script, and for models with variants.
UNSAID = {"max_position_embeddings", "position_embedding_type"}
UNSAID_BY = {
    "qwen2.5-32B": {"norm_epsilon"},
    # Megatron has no flags for these
    "llama3.1-8B": {
        "rope_scaling_low_freq_factor",
        "rope_scaling_high_freq_factor",
        "rope_scaling_original_max_position",
    },
    "moonlight": {"rotary_scaling_factor"},  # only YaRN scales
}


def printed_words(command: list[str], **env: str) -> list[str]:
    """The words that a shell script passes to Python. $PYTHON is a script that prints them."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=30, check=True, env=os.environ | env
    )
    return done.stdout.splitlines()


def recipe_argv(script: Path, folder: Path, config: dict, **env: str) -> tuple[str, list[str]]:
    """(entry point, flags) of a recipe whose paths are files in `folder`."""
    printer = folder / "printer"
    printer.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    printer.chmod(0o755)
    (folder / "ref").mkdir()
    paths = {
        "PYTHON": printer,
        "HF_CHECKPOINT": write_checkpoint(folder / "hf", **config),
        "REF_LOAD": folder / "ref",
        "SAVE": folder / "save",
        "PROMPT_DATA": write_prompts(folder / "train.jsonl"),
        "EVAL_DATA": write_prompts(folder / "eval.jsonl"),
        "RUN_DIR": folder,
    }
    entry, *argv = printed_words(
        ["bash", str(script)], **{k: str(v) for k, v in paths.items()}, **env
    )
    return Path(entry).name, argv


def config_for(script: Path) -> dict:
    """The config of the model whose script the recipe sources."""
    text = script.read_text()
    (name,) = [model.stem for model in MODELS if f"models/{model.name}" in text]
    return CONFIGS[name]


def test_the_shipped_recipes_and_models_are_complete():
    ours = {f"run-{name}.sh" for name in ("qwen3-4B", "qwen3-0.6B-1gpu", "qwen3-0.6B-2gpu")}
    assert {r.name for r in RECIPES} >= ours | {"run-tiny-cpu.sh"}
    assert {m.stem for m in MODELS} == set(CONFIGS)


@pytest.mark.parametrize("script", RECIPES, ids=lambda path: path.name)
def test_a_recipe_parses(script, tmp_path):
    _, argv = recipe_argv(script, tmp_path, config_for(script))
    cfg = parse_config(argv, checks=[check_training])
    assert cfg.cluster.colocate == ("2gpu" not in script.name)
    assert cfg.batch.samples == 256
    assert cfg.algorithm.clip_high == 0.28
    assert cfg.checkpoint.load == cfg.checkpoint.save
    assert cfg.model.args["num_layers"] == config_for(script)["num_hidden_layers"]


@pytest.mark.parametrize("script", RECIPES, ids=lambda path: path.name)
def test_flags_after_a_recipe_override_its_own(script, tmp_path):
    printer = recipe_argv(script, tmp_path, config_for(script))
    assert printer[0] == "train.py"
    argv = printed_words(
        ["bash", str(script), "--num-rollout", "7"],
        PYTHON=str(tmp_path / "printer"),
        RUN_DIR=str(tmp_path),
    )
    assert argv[-2:] == ["--num-rollout", "7"]


@pytest.mark.parametrize("name", ["run-tiny-cpu.sh", "run-qwen3-0.6B-2gpu.sh"])
def test_a_decoupled_recipe_may_generate_while_it_trains(name, tmp_path):
    script = SCRIPTS / name
    entry, argv = recipe_argv(script, tmp_path, config_for(script), MODE="async")
    argv += ["--num-rollout", "2"]
    cfg = parse_config(argv, checks=[check_training])
    assert entry == "train_async.py"
    assert not cfg.cluster.colocate
    assert (cfg.cluster.total_gpus, cfg.batch.num_rollout) == (2, 2)
    assert cfg.algorithm.use_rollout_logprobs


EIGHT_GPUS = {
    "colocated": ("train.py", "engines: 4 of 2 GPUs each, the trainer's, in turn", 8),
    "decoupled": ("train.py", "engines: 3 of 2 GPUs each, their own", 2),
    "async": ("train_async.py", "engines: 3 of 2 GPUs each, their own", 2),
}


@pytest.mark.parametrize("mode", EIGHT_GPUS)
def test_the_founding_recipe_is_planned_for_eight_gpus(mode, tmp_path, capsys):
    """On a machine without GPUs: layout, batch and a peak below 80 GB."""
    wanted, engines, trainers = EIGHT_GPUS[mode]
    script = SCRIPTS / "run-qwen3-4B.sh"
    entry, argv = recipe_argv(script, tmp_path, CONFIGS["qwen3-4B"], MODE=mode)
    assert entry == wanted
    argv += ["--dry-run", "--plan-gpu-memory", "80"]
    with pytest.raises(SystemExit) as stopped:
        parse_config(argv, checks=[check_training])
    assert stopped.value.code == 0
    plan = capsys.readouterr().out
    for line in (
        f"trainer: {trainers} GPUs = TP 2 x PP 1 x CP 1 x DP {trainers // 2}",
        engines,
        "together: 8 GPUs (cuda)",
        f"256 samples / {trainers // 2} data-parallel rank",
        "parameters, bfloat16",
        "a GPU of 80.0 GiB, less --train-memory-margin-bytes (1.0 GiB), leaves ",
        "--vllm-gpu-memory-utilization 0.7 takes 56.0 GiB of 80.0",
    ):
        assert line in plan


def test_the_recipe_can_be_a_ray_job(tmp_path):
    script = SCRIPTS / "run-qwen3-4B.sh"
    _, plain = recipe_argv(script, tmp_path, CONFIGS["qwen3-4B"])
    ray = tmp_path / "bin" / "ray"
    ray.parent.mkdir()
    ray.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    ray.chmod(0o755)
    env = {"PATH": f"{ray.parent}:{os.environ['PATH']}", "LAUNCH": "ray-job", "PYTHON": "python3"}
    said = printed_words(["bash", str(script)], RAY_ADDRESS="http://127.0.0.1:8265", **env)
    assert said[:3] == ["job", "submit", "--submission-id"]
    assert said[4:6] == ["--", "python3"]
    assert said[6].endswith("/train.py")
    assert len(said) == 7 + len(plain)


def test_a_ray_job_without_a_cluster_is_refused():
    done = subprocess.run(
        ["bash", str(SCRIPTS / "run-qwen3-4B.sh")],
        capture_output=True,
        text=True,
        timeout=30,
        env=os.environ | {"LAUNCH": "ray-job", "RAY_ADDRESS": ""},
    )
    assert done.returncode == 2
    assert "LAUNCH=ray-job needs RAY_ADDRESS" in done.stderr


@pytest.mark.parametrize("script", MODELS, ids=lambda path: path.stem)
def test_model_args_agree_with_the_config(script, tmp_path):
    argv = printed_words(["bash", "-c", f'source {script}; printf "%s\\n" "${{MODEL_ARGS[@]}}"'])
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[script.stem]))
    argv += ["--hf-checkpoint", str(tmp_path), "--save", str(tmp_path / "out")]
    cfg = parse_convert_config(argv)
    assert check_model_args(cfg) == []
    derived = architecture(CONFIGS[script.stem])
    neutral = {"rotary_percent": 1.0}
    if not derived["group_query_attention"]:
        neutral["num_query_groups"] = derived["num_query_groups"]
    said = {name for name, v in derived.items() if v not in (None, False, neutral.get(name))}
    unsaid = UNSAID | UNSAID_BY.get(script.stem, set())
    assert said - unsaid <= cfg.model.args.keys()


@pytest.mark.parametrize("script", RECIPES, ids=lambda path: path.name)
def test_a_recipe_ends_no_process_that_it_did_not_start(script):
    text = script.read_text() + (SCRIPTS / "launch.sh").read_text()
    for word in ("pkill", "killall", "ray stop", "kill -9"):
        assert word not in text

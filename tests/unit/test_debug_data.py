"""Samples become dicts and rollouts become files, both without a loss."""

import re
from dataclasses import fields

import numpy as np
import pytest

from tests.unit.fake_engine import make_config, write_prompts
from vime.cli import parse_config
from vime.config.view import ArgsView
from vime.data.batching import build_train_batch
from vime.errors import ConfigError, PluginError
from vime.rollout import debug_data
from vime.types import RolloutFnEvalOutput, Sample, Status

FULL = {
    "group_index": 3,
    "index": 12,
    "rollout_id": 5,
    "prompt": [{"role": "user", "content": "?"}],
    "tokens": [1, 2, 3],
    "response": "x",
    "response_length": 2,
    "label": "4",
    "reward": {"score": 1.0, "acc": True},
    "loss_mask": [1, 0],
    "rollout_log_probs": [-0.5, -1.5],
    "weight_versions": [4, 5],
    "status": Status.TRUNCATED,
    "failure": "why",
    "metadata": {"start_rollout_id": 4, "nested": {"a": [1]}},
    "train_metadata": {"w": 2.0},
    "apply_chat_template_kwargs": {"enable_thinking": False},
    "teacher_log_probs": [-0.5, -1.0],
    "rollout_routed_experts": [[0, 3]],
    "rollout_top_p_token_ids": [4, 5],
    "rollout_top_p_token_offsets": [0, 2],
    "multimodal_inputs": {"images": ["a"]},
    "multimodal_train_inputs": {"pixels": [1]},
    "spec_info": {"accepted": 1},
    "prefix_cache_info": {"hits": 2},
    "remove_sample": True,
    "custom_rm_path": "a.b",
    "generate_function_path": "c.d",
    "session_id": "s",
    "non_generation_time": 0.25,
}


def test_a_sample_keeps_every_field_through_its_dict():
    assert set(FULL) == {f.name for f in fields(Sample)}
    sample = Sample(**FULL)
    data = sample.to_dict()
    assert data["status"] == "truncated"
    assert Sample.from_dict(data) == sample
    data["metadata"]["nested"]["a"].append(2)
    assert sample.metadata["nested"]["a"] == [1]
    with pytest.raises(KeyError, match="colour"):
        Sample.from_dict({"colour": 1})


def groups():
    return [
        [
            Sample(**FULL | {"group_index": g, "index": 2 * g + i, "reward": float(i)})
            for i in (0, 1)
        ]
        for g in (0, 1)
    ]


def test_a_saved_rollout_gives_the_same_batch_again(tmp_path):
    path = str(tmp_path / "deep" / "{rollout_id}.pt")
    written = debug_data.save_rollout(path, 7, groups(), {"rollout/groups_taken": 2})
    assert written == tmp_path / "deep" / "7.pt"
    cfg = make_config("none", debug={"load_rollout_data": path})
    output = debug_data.generate_rollout(ArgsView(cfg), 7, None)
    assert output.samples == groups()
    assert output.metrics == {"rollout/groups_taken": 2.0}
    first, again = (build_train_batch(g, cfg, 7) for g in (groups(), output.samples))
    assert [s.reward for s in first.sequences] == [s.reward for s in again.sequences]
    assert [p.name for p in written.parent.iterdir()] == ["7.pt"]


def test_numpy_values_become_plain_and_unsavable_values_are_named(tmp_path):
    path = str(tmp_path / "{rollout_id}.pt")
    sample = Sample(**FULL | {"reward": np.float64(0.5), "metadata": {"a": np.arange(2)}})
    debug_data.save_rollout(path, 0, [[sample]], {})
    (loaded,) = debug_data.load_rollout(path, 0).samples[0]
    assert (loaded.reward, loaded.metadata) == (0.5, {"a": [0, 1]})
    sample.metadata["tool"] = re.compile("x")
    with pytest.raises(PluginError, match=r"sample 12\['metadata'\]\['tool'\] is a Pattern"):
        debug_data.save_rollout(path, 0, [[sample]], {})


def test_a_missing_or_damaged_rollout_is_reported(tmp_path):
    path = str(tmp_path / "{rollout_id}.pt")
    with pytest.raises(ConfigError, match="3.pt does not exist. Lower --num-rollout"):
        debug_data.load_rollout(path, 3)
    (tmp_path / "3.pt").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="is not a saved rollout"):
        debug_data.load_rollout(path, 3)
    with pytest.raises(ConfigError, match="holds no evaluations"):
        debug_data.generate_rollout(None, 0, None, evaluation=True)


def test_an_evaluation_has_its_own_file(tmp_path):
    output = RolloutFnEvalOutput({"held": {"rewards": [1.0], "samples": groups()[0][:1]}})
    written = debug_data.save_evaluation(str(tmp_path / "{rollout_id}.pt"), 4, output)
    assert written.name == "eval_4.pt"


def parsed(tmp_path, words, capsys):
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    prompts = write_prompts(tmp_path / "q.jsonl", 2)
    common = (
        f"--hf-checkpoint {tmp_path} --prompt-data {prompts} --input-key prompt --num-rollout 1 "
        "--rollout-batch-size 1 --rm-type math --actor-num-gpus-per-node 1 --rollout-num-gpus 2 "
    )
    try:
        return parse_config((common + words).split())
    except SystemExit:
        return capsys.readouterr().err


def test_debug_flags_decide_whether_engines_and_trainer_are_needed(tmp_path, capsys):
    loads = parsed(tmp_path, "--load-debug-rollout-data d/{rollout_id}.pt", capsys)
    assert loads.debug.no_engines
    assert loads.total_gpus == 1
    only = parsed(tmp_path, "--debug-rollout-only", capsys)
    assert not only.debug.no_engines
    assert only.total_gpus == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--save-debug-rollout-data all.pt", "names one place for all rollouts"),
        ("--load-debug-rollout-data all.pt", "names one place for all rollouts"),
        ("--debug-rollout-only --load-debug-rollout-data d/{rollout_id}.pt", "does not train"),
        ("--debug-rollout-only --debug-train-only", "leave nothing to run"),
        ("--debug-rollout-only --save d --save-interval 1", "has no trainer"),
    ],
)
def test_contradicting_debug_flags_are_refused(tmp_path, capsys, words, said):
    assert said in parsed(tmp_path, words, capsys)

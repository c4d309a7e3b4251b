"""The read-only `args` that plugins get: every flag by its name, with its resolved value."""

import copy
import pickle

import pytest

from tests.unit.command_lines import Flags, refused, words
from vime.cli import parse_config
from vime.config.fields import flags_in
from vime.config.view import SECTIONS, ArgsView
from vime.errors import PluginError


def view(folder, changes: Flags | None = None, **runtime) -> ArgsView:
    return ArgsView(parse_config(words(folder, changes or {})), **runtime)


def test_every_flag_can_be_read_by_its_name(tmp_path):
    args = view(tmp_path)
    specs = [s for name in SECTIONS for s in flags_in(type(getattr(args.config, name))).values()]
    assert len(specs) > 200
    assert [spec.name for spec in specs if not hasattr(args, spec.dest)] == []


def test_flags_keep_their_command_line_spelling(tmp_path):
    args = view(tmp_path, {"--lr": "2e-4", "--reward-key": "score"})
    assert (args.rollout_batch_size, args.n_samples_per_prompt) == (32, 8)
    assert (args.lr, args.reward_key, args.rm_type) == (2e-4, "score", "math")
    assert args.hf_checkpoint == str(tmp_path / "hf")


def test_derived_values_are_resolved(tmp_path):
    args = view(tmp_path, {"--eps-clip": "0.3", "--colocate": None, "--rollout-num-gpus": "4"})
    assert args.eps_clip_high == 0.3
    assert args.vllm_router_policy == "round_robin"
    assert args.rollout_num_gpus == 8
    assert args.over_sampling_batch_size == 32
    assert (args.num_steps_per_rollout, args.global_batch_size) == (1, 256)


def test_evaluation_inherits_rollout_flags_that_no_eval_flag_overrides(tmp_path):
    args = view(tmp_path, {"--rollout-temperature": "0.7", "--eval-max-response-len": "2048"})
    assert (args.eval_temperature, args.eval_top_p, args.eval_top_k) == (0.7, 1.0, -1)
    assert (args.eval_max_response_len, args.rollout_max_response_len) == (2048, 1024)
    assert (args.eval_input_key, args.eval_label_key) == ("prompt", "label")


def test_an_eval_flag_of_zero_overrides_too(tmp_path):
    assert view(tmp_path, {"--eval-temperature": "0"}).eval_temperature == 0.0


def test_a_negated_flag_has_its_own_name_too(tmp_path):
    args = view(tmp_path, {"--disable-grpo-std-normalization": None})
    assert args.disable_grpo_std_normalization is True
    assert args.grpo_std_normalization is False


def test_model_args_and_vllm_flags_are_there(tmp_path):
    args = view(tmp_path, {"--num-layers": "3", "--vllm-max-model-len": "4096"})
    assert args.num_layers == 3
    assert args.vllm_max_model_len == "4096"


def test_values_known_only_while_a_job_runs_are_added(tmp_path):
    args = view(tmp_path, vllm_router_ip="127.0.0.1", vllm_router_port=8123)
    assert (args.vllm_router_ip, args.vllm_router_port) == ("127.0.0.1", 8123)


def test_writing_says_what_to_do_instead(tmp_path):
    args = view(tmp_path)
    with pytest.raises(PluginError, match=r"args.lr = 1: .*read-only. Set --lr .*sample.metadata"):
        args.lr = 1
    with pytest.raises(PluginError, match="read-only"):
        del args.lr
    assert args.lr == 1e-6


def test_an_unknown_name_suggests_the_nearest(tmp_path):
    args = view(tmp_path)
    with pytest.raises(AttributeError, match=r"Did you mean args.rollout_batch_size\?"):
        _ = args.rollout_batchsize
    assert getattr(args, "nothing_like_it", None) is None


def test_its_text_has_no_keys(tmp_path):
    args = view(tmp_path, vllm_api_key="s3cret")
    assert args.vllm_api_key == "s3cret"
    assert "vllm_api_key='(hidden)'" in repr(args)
    assert "s3cret" not in repr(args)


def test_it_can_be_sent_to_other_processes(tmp_path):
    args = view(tmp_path, vllm_router_port=8123)
    for twin in (pickle.loads(pickle.dumps(args)), copy.deepcopy(args)):
        assert twin.config == args.config
        assert twin.vllm_router_port == 8123


def test_a_users_own_values_stand_beside_the_flags(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("tool_url: http://127.0.0.1:9\nlimits: {calls: 3}\n")
    args = view(tmp_path, {"--custom-config-path": str(own)})
    assert (args.tool_url, args.limits) == ("http://127.0.0.1:9", {"calls": 3})
    own.write_text("tool_url: edited during the run\n")
    assert pickle.loads(pickle.dumps(args)).tool_url == "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "rollout_batch_size: 3",
            "vime uses the name rollout_batch_size. Give --rollout-batch-size",
        ),
        ("- a", "is not a mapping of names to values"),
        ("a: [", "is not YAML"),
        (None, "cannot be read"),
    ],
)
def test_an_unusable_file_of_own_values_is_refused(capsys, tmp_path, text, words):
    own = tmp_path / "own.yaml"
    if text is not None:
        own.write_text(text)
    (problem,) = refused(capsys, tmp_path, {"--custom-config-path": str(own)})
    assert problem.startswith(f"--custom-config-path {own}")
    assert words in problem

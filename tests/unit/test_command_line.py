"""Flags become a typed configuration. The message of each mistake names flag, value and remedy."""

import re
import subprocess
import sys

import pytest

from tests.unit.command_lines import refusal, refused, words, write_checkpoint
from vime.algorithms.advantages import ESTIMATORS
from vime.cli import parse_config, parse_convert_config
from vime.cli.absent_flags import ABSENT
from vime.cli.flags import all_flags
from vime.cli.megatron_flags import _names, is_megatrons
from vime.config.sections.algorithm import AlgorithmConfig


def test_flags_fill_the_fields_that_declare_them(tmp_path):
    cfg = parse_config(
        words(
            tmp_path,
            {"--lr": "2e-4", "--colocate": None, "--rollout-top-k": "-1", "--rollout-stop": "a b"},
        )
    )
    assert (cfg.batch.prompts, cfg.batch.samples_per_prompt, cfg.batch.num_rollout) == (32, 8, 3)
    assert cfg.optimizer.lr == 2e-4
    assert cfg.cluster.colocate is True
    assert cfg.rollout.top_k == -1
    assert cfg.rollout.stop == ["a", "b"]
    assert cfg.data.label_key == "label"


def test_flags_that_are_not_given_keep_their_defaults(tmp_path):
    cfg = parse_config(words(tmp_path, {}))
    assert cfg.cluster.colocate is False
    assert cfg.rollout.stop is None
    assert cfg.algorithm == AlgorithmConfig()


def test_a_negation_sets_false_and_the_last_flag_wins(tmp_path):
    off = parse_config([*words(tmp_path, {}), "--save-optim", "--no-save-optim"])
    on = parse_config([*words(tmp_path, {}), "--no-save-optim", "--save-optim"])
    assert off.checkpoint.save_optim is False
    assert on.checkpoint.save_optim is True


def test_the_last_of_a_repeated_flag_wins(tmp_path):
    assert parse_config([*words(tmp_path, {}), "--num-rollout", "9"]).batch.num_rollout == 9


def test_a_value_may_follow_an_equals_sign(tmp_path):
    assert parse_config([*words(tmp_path, {}), "--num-rollout=9"]).batch.num_rollout == 9


def test_json_values_are_read(tmp_path):
    argv = [*words(tmp_path, {}), "--apply-chat-template-kwargs", '{"enable_thinking": false}']
    assert parse_config(argv).data.apply_chat_template_kwargs == {"enable_thinking": False}


def test_model_args_are_collected_as_given(tmp_path):
    argv = [*words(tmp_path, {}), "--num-layers", "3", "--swiglu", "--rotary-base", "10000"]
    assert parse_config(argv).model.args == {"num_layers": 3, "swiglu": True, "rotary_base": 1e4}


@pytest.mark.stack
def test_unknown_vllm_flags_go_to_the_engine(tmp_path):
    argv = words(
        tmp_path,
        {
            "--vllm-gpu-memory-utilization": "0.7",
            "--vllm-enforce-eager": None,
            "--vllm-router-policy": "random",
        },
    )
    cfg = parse_config([*argv, "--vllm-max-num-seqs=64"])
    assert cfg.engine.vllm_args == {
        "gpu_memory_utilization": "0.7",
        "enforce_eager": True,
        "max_num_seqs": "64",
    }
    assert cfg.router_policy == "random"


@pytest.mark.stack
def test_router_flags_go_to_the_router(tmp_path):
    pytest.importorskip("vllm_router", reason="needs vllm-router")
    given = {"--router-cache-threshold": "0.5", "--router-disable-retries": None}
    cfg = parse_config(words(tmp_path, given | {"--router-request-timeout-secs": "60"}))
    assert cfg.engine.router_args == {"cache_threshold": "0.5", "disable_retries": True}
    assert cfg.engine.request_timeout_s == 60


@pytest.mark.stack
@pytest.mark.parametrize(
    ("flag", "value", "answer"),
    [
        ("--router-cache-treshold", "0.5", "no such flag. Did you mean --router-cache-threshold?"),
        ("--router-cache-threshold", "half", "vllm-router refuses it.*invalid float value"),
        ("--router-policy", "random", "is set by vime. Use --vllm-router-policy"),
        ("--vllm-router-policy", "fairest", "vllm-router refuses it.*round_robin"),
        ("--router-request-timeout-sec", "9", "Did you mean --router-request-timeout-secs?"),
    ],
)
def test_the_routers_own_parser_judges_its_flags(capsys, tmp_path, flag, value, answer):
    pytest.importorskip("vllm_router", reason="needs vllm-router")
    (problem,) = refused(capsys, tmp_path, {flag: value})
    assert re.search(f"{flag} {value}.*{answer}", problem)


def test_no_flag_is_listed_as_absent():
    assert ABSENT.keys().isdisjoint(all_flags())


def test_bf16_sets_the_dtype(tmp_path):
    assert parse_config([*words(tmp_path, {}), "--bf16"]).model.dtype == "bfloat16"


def test_a_flag_that_changes_nothing_here_passes_with_a_notice(capsys, tmp_path):
    parse_config([*words(tmp_path, {}), *["--no-rope-fusion", "--seq-length", "4096"]])
    assert capsys.readouterr().err.splitlines()[:2] == [
        "note: --no-rope-fusion changes nothing: vime chooses its kernels itself.",
        "note: --seq-length 4096 changes nothing: packs differ in length.",
    ]


def test_the_listed_names_of_megatron_are_flags():
    assert len(_names()) > 1000
    assert all(re.fullmatch(r"--[a-z0-9][A-Za-z0-9_-]+", name) for name in _names())
    assert all(map(is_megatrons, ("--tensor-model-parallel-size", "--fp8-param-gather")))


def test_both_spellings_of_virtual_stages_are_one_flag(tmp_path):
    flags = {"--pipeline-model-parallel-size": "2", "--num-virtual-stages-per-pipeline-rank": "2"}
    assert parse_config(words(tmp_path, flags)).parallel.vpp == 2


@pytest.mark.parametrize(("layers", "parts"), [("1", 3), ("3", None)])
def test_virtual_stages_follow_from_the_layers_of_one(tmp_path, layers, parts):
    flags = {
        "--pipeline-model-parallel-size": "2",
        "--num-layers-per-virtual-pipeline-stage": layers,
    }
    argv = words(tmp_path, flags)
    write_checkpoint(tmp_path / "hf", num_hidden_layers=6)
    assert parse_config(argv).parallel.vpp == parts


def test_braces_that_belong_to_a_name_are_doubled(tmp_path):
    template = "out/{{run}}/{rollout_id:03d}"
    argv = words(tmp_path, {"--save-hf": template, "--save-interval": "1"})
    assert parse_config(argv).checkpoint.save_hf.format(rollout_id=7) == "out/{run}/007"


def test_megatron_flags_that_match_vimes_behaviour_are_accepted(tmp_path):
    argv = "--attention-dropout 0.0 --hidden-dropout 0 --attention-backend flash --no-rope-fusion"
    assert parse_config([*words(tmp_path, {}), *argv.split()]).batch.prompts == 32


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"--rollout-bach-size": "3"},
            "--rollout-bach-size 3 is not a known flag. Did you mean --rollout-batch-size?",
        ),
        (
            {"--vllm-router-polcy": "random"},
            "--vllm-router-polcy random is not a known flag. Did you mean --vllm-router-policy?",
        ),
        (
            {"--qqqq": None},
            "--qqqq is not a known flag. --help lists every flag.",
        ),
        (
            {"--rollout-health-check-interval": "30"},
            "--rollout-health-check-interval 30: vime has no such flag; --use-fault-tolerance "
            "checks the engines when a rollout or an update fails. Leave it out.",
        ),
        (
            {"--vllm-config": "f.yaml"},
            "--vllm-config f.yaml: vime has no such flag; all engines have the same flags and "
            "serve the same policy. Leave it out.",
        ),
        ({"--lr": "fast"}, "--lr fast is not a number. Give a number, such as 0.1."),
        ({"--lr": "nan"}, "--lr nan is not a number. Give a number, such as 0.1."),
        (
            {"--num-rollout": "1.5"},
            "--num-rollout 1.5 is not a whole number. Give a whole number, such as 8.",
        ),
        (
            {"--apply-chat-template-kwargs": "{"},
            "--apply-chat-template-kwargs { is not a JSON object. Give a JSON object, such as "
            "'{\"key\": true}'.",
        ),
        (
            {"--apply-chat-template-kwargs": "3"},
            "--apply-chat-template-kwargs 3 is not a JSON object. Give a JSON object, such as "
            "'{\"key\": true}'.",
        ),
        (
            {"--pipeline-model-parallel-layout": "Et*3|tL"},
            "--pipeline-model-parallel-layout Et*3|tL is a Megatron flag that vime does not "
            "support. Leave it out.",
        ),
        (
            {"--fp8-param-gather": None},
            "--fp8-param-gather is a Megatron flag that vime does not support. Leave it out.",
        ),
        (
            {"--moe-token-dispatcher-type": "flex"},
            "--moe-token-dispatcher-type flex is not possible: packs differ in length, which "
            "Megatron allows with alltoall only. Give alltoall, or leave it out.",
        ),
        (
            {"--rotary-seq-len-interpolation-factor": "2"},
            "--rotary-seq-len-interpolation-factor 2 is not possible: positions are scaled as "
            "config.json of --hf-checkpoint says. Give 1 or 1.0, or leave it out.",
        ),
        (
            {"--moe-grouped-gemm": None},
            "--moe-grouped-gemm: vime has no such flag; each expert multiplies its own tokens, "
            "without the fused kernels of TransformerEngine. Leave it out.",
        ),
        (
            {"--moe-permute-fusion": None},
            "--moe-permute-fusion: vime has no such flag; each expert multiplies its own tokens, "
            "without the fused kernels of TransformerEngine. Leave it out.",
        ),
        ({"--lr": None}, "--lr has no value. Write --lr VALUE, or leave it out."),
        (
            {"--rollout-seed": "1 2"},
            "--rollout-seed 1 2: the flag takes one value, not 2. Keep one, or put quotes "
            "around all (--rollout-seed '1 2').",
        ),
        (
            {"--colocate": "true"},
            "--colocate true: a switch takes no value. Write --colocate alone, or leave it out.",
        ),
        (
            {"--hf-checkpoint": ""},
            "--hf-checkpoint is missing: HF folder: config, tokenizer, weights; vLLM starts from "
            "it. Add --hf-checkpoint VALUE.",
        ),
        ({"--rollout-top-p": "1.5"}, "--rollout-top-p 1.5 is too large. Give 1 or less."),
        ({"--rollout-top-p": "0"}, "--rollout-top-p 0.0 is too small. Give more than 0."),
        ({"--eps-clip": "-1"}, "--eps-clip -1.0 is too small. Give 0 or more."),
        (
            {"--kl-loss-type": "k9"},
            "--kl-loss-type k9 is not known. Choose from k1, k2, k3, low_var_kl.",
        ),
        (
            {"--attention-dropout": "0.1"},
            "--attention-dropout 0.1 is not possible: neither training nor generation uses "
            "dropout. Give 0 or 0.0, or leave it out.",
        ),
    ],
)
def test_a_mistake_is_reported_with_flag_value_and_remedy(capsys, tmp_path, changes, expected):
    assert refused(capsys, tmp_path, changes) == [expected]


def test_a_stray_word_is_refused(capsys, tmp_path):
    argv = ["stray", *words(tmp_path, {})]
    assert refusal(capsys, lambda: parse_config(argv)) == [
        "stray belongs to no flag. Remove it, or add the flag before it."
    ]


def test_all_problems_are_reported_at_once(capsys, tmp_path):
    def check(cfg):
        return [f"--rm-type {cfg.reward.rm_type} is not mine. Choose another."]

    argv = words(
        tmp_path,
        {
            "--hf-checkpoint": str(tmp_path / "missing"),
            "--num-steps-per-rollout": "3",
            "--lr": "fast",
            "--unknwon": None,
            "--over-sampling-batch-size": "16",
            "--label-key": "answer",
        },
    )
    found = "\n".join(refusal(capsys, lambda: parse_config(argv, checks=[check])))
    for flag in (
        "--hf-checkpoint",
        "--num-steps-per-rollout 3",
        "--lr fast",
        "--unknwon",
        "--over-sampling-batch-size 16",
        "'answer' (--label-key)",
        "--rm-type math",
    ):
        assert flag in found


def test_a_check_that_fails_on_a_reported_problem_adds_no_message(capsys, tmp_path):
    def check(cfg):
        return [f"{cfg.optimizer.lr * 2}"]

    argv = words(tmp_path, {"--lr": "fast"})
    assert len(refusal(capsys, lambda: parse_config(argv, checks=[check]))) == 1


def test_a_path_that_the_user_may_not_read_is_reported_with_its_flag(capsys, tmp_path):
    def check(cfg):
        raise PermissionError(13, "Permission denied", f"{cfg.checkpoint.load}/iter_0000001")

    argv = words(tmp_path, {"--load": f"{tmp_path}/load"})
    assert refusal(capsys, lambda: parse_config(argv, checks=[check])) == [
        f"--load {tmp_path}/load: this user may not read {tmp_path}/load/iter_0000001. Choose "
        "another place, or change its permissions."
    ]


def test_a_bug_in_a_check_is_not_hidden(tmp_path):
    def check(cfg):
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="of ours"):
        parse_config(words(tmp_path, {}), checks=[check])


def test_a_malformed_line_is_reported_with_its_number(capsys, tmp_path):
    argv = words(tmp_path, {})
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write("{not json\n")
    (problem,) = refusal(capsys, lambda: parse_config(argv))
    assert problem.startswith(f"--prompt-data {tmp_path}/train.jsonl")
    assert "line 5" in problem


def test_evaluation_data_inherits_the_keys_of_the_prompts(capsys, tmp_path):
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text('{"prompt": "1+1?"}\n')
    changes = {"--eval-interval": "5", "--eval-prompt-data": f"sums {held_out}"}
    (problem,) = refused(capsys, tmp_path, changes)
    assert "--eval-prompt-data" in problem
    assert "'label'" in problem


def test_help_names_every_flag_once_and_exits_with_0(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for line in ("Batch:", "  --rollout-batch-size N ", "  --num-layers N", "  --colocate "):
        assert text.count(line) == 1
    assert "(required)" in text


def test_the_converter_needs_only_the_model_and_a_target(tmp_path):
    folder = write_checkpoint(tmp_path / "hf")
    argv = f"--hf-checkpoint {folder} --save {tmp_path}/out --num-layers 3"
    cfg = parse_convert_config([*argv.split(), "--tensor-model-parallel-size", "2"])
    assert cfg.model.args == {"num_layers": 3}
    assert cfg.checkpoint.save == f"{tmp_path}/out"
    assert cfg.parallel.tp == 2


def test_the_converter_without_a_target_is_refused(capsys, tmp_path):
    argv = ["--hf-checkpoint", str(write_checkpoint(tmp_path / "hf"))]
    assert refusal(capsys, lambda: parse_convert_config(argv)) == [
        "--save is missing. Add --save FOLDER for the converted checkpoint."
    ]


def test_every_estimator_parses(tmp_path):
    for name, estimator in ESTIMATORS.items():
        cfg = parse_config(words(tmp_path, {"--advantage-estimator": name}))
        assert cfg.algorithm.estimator is estimator


def test_parsing_imports_nothing_heavy(tmp_path):
    code = (
        "import sys; from vime.cli import parse_config; parse_config(); "
        "print(sorted({'torch', 'ray', 'megatron', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words(tmp_path, {})],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "[]"

"""--eval-config: several datasets, each with its own grader, keys and sampling."""

import json

import pytest

from tests.unit.fake_engine import FakeEngine, ids_of, make_config, write_prompts
from vime.cli import parse_config
from vime.config.evaluation import eval_datasets
from vime.config.fields import flags_in
from vime.config.plugins import check_plugins
from vime.config.sections.evaluation import EvalConfig, dataset_keys, read_eval_config
from vime.data.checks import data_problems
from vime.errors import ConfigError
from vime.rollout import metrics
from vime.rollout.grading import check_rewards
from vime.rollout.vllm_rollout import generate_rollout
from vime.types import Sample, Status


def write(tmp_path, text):
    path = tmp_path / "eval.yaml"
    path.write_text(text)
    return str(path)


LAYERS = """
eval:
  defaults: {temperature: 0.3, max_response_len: 20, n_samples_per_eval_prompt: 3}
  datasets:
    - {name: own, path: a.jsonl, temperature: 0.1, top_k: 4}
    - {name: plain, path: b.jsonl}
"""


def test_dataset_values_override_defaults_override_eval_flags_override_rollout_flags(tmp_path):
    cfg = make_config(
        "none",
        rollout={"temperature": 0.9, "top_p": 0.8, "top_k": 50, "max_context_len": 99},
        eval={
            "config": read_eval_config(write(tmp_path, LAYERS)),
            "temperature": 0.5,
            "top_k": 9,
            "samples_per_prompt": 7,
            "max_response_len": 5,
        },
    )
    own, plain = (dataset.cfg for dataset in eval_datasets(cfg))
    assert (own.rollout.temperature, plain.rollout.temperature) == (0.1, 0.3)  # dataset, defaults
    assert (own.rollout.top_k, plain.rollout.top_k) == (4, 9)  # dataset, --eval-*
    assert (own.rollout.max_response_len, own.eval.samples_per_prompt) == (20, 3)  # defaults
    assert (plain.rollout.top_p, plain.rollout.max_context_len) == (0.8, 99)  # --rollout-*
    assert cfg.eval.datasets == {"own": "a.jsonl", "plain": "b.jsonl"}


def test_naming_one_kind_of_grader_unsets_the_other(tmp_path):
    text = """
eval:
  defaults: {custom_rm_path: a.b}
  datasets:
    - {name: x, path: x.jsonl}
    - {name: y, path: y.jsonl, rm_type: gpqa}
"""
    cfg = make_config(
        "none",
        reward={"rm_type": "math"},
        eval={"config": read_eval_config(write(tmp_path, text))},
    )
    x, y = (dataset.cfg.reward for dataset in eval_datasets(cfg))
    assert (x.rm_type, x.custom_rm_path) == (None, "a.b")
    assert (y.rm_type, y.custom_rm_path) == ("gpqa", None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("eval: [", "is not YAML"),
        ("evaluation: {}", "has no eval.datasets"),
        ("eval: {datasets: []}", "is empty"),
        ("eval: {datasets: [{name: a}]}", r"datasets\[0\] has no path"),
        ("eval: {datasets: [{name: a, path: p, temprature: 1}]}", "Did you mean temperature"),
        ("eval: {datasets: [{name: a, path: p, top_k: high}]}", "'high' is a str. Give int"),
        ("eval: {datasets: [{name: a, path: p, top_k: true}]}", "is a bool. Give int"),
        ("eval: {datasets: [{name: a, path: p, max_response_len: 0}]}", "0 is too small"),
        ("eval: {datasets: [{name: a, path: p, top_p: 1.5}]}", r"\.top_p 1.5 is too large"),
        ("eval: {datasets: [{name: a, path: p, stop_token_ids: [a]}]}", "holds 'a', a str"),
        ("eval: {datasets: [{name: a, path: p, eval_top_k: 1}]}", "Did you mean top_k"),
        ("eval: {defaults: {name: a}, datasets: [{name: a, path: p}]}", "unknown key 'name'"),
        ("eval: {datasets: [{name: a, path: p}, {name: a, path: q}]}", "'a' twice"),
    ],
)
def test_a_wrong_file_is_refused_with_its_own_mistake(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words):
        read_eval_config(write(tmp_path, text))


def test_a_key_that_is_null_is_not_set(tmp_path):
    text = "eval: {datasets: [{name: a, path: p, temperature: null, max_prompt_len: null}]}"
    rollout = {"temperature": 0.5, "max_prompt_len": 3}
    config = read_eval_config(write(tmp_path, text))
    [dataset] = eval_datasets(make_config("none", rollout=rollout, eval={"config": config}))
    assert (dataset.cfg.rollout.temperature, dataset.cfg.rollout.max_prompt_len) == (1.0, None)


def test_a_flag_with_a_twin_is_a_key_of_a_data_set_without_another_declaration():
    twins = {name: spec for name, spec in flags_in(EvalConfig).items() if spec.inherits}
    assert len(twins) == 11
    for spec in twins.values():
        if spec.name != "--eval-function-path":
            place = dataset_keys()[spec.dataset_key]
            assert place.spec.name == spec.inherits
            assert place.spec.name in (f"--rollout-{spec.name[7:]}", f"--{spec.name[7:]}")
            assert (place.spec.at_least, place.spec.above) == (spec.at_least, spec.above)


def test_values_that_fit_rollouts_but_not_an_evaluation_are_refused_at_the_start(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    prompts = write_prompts(tmp_path / "q.jsonl", 2)
    text = (
        f"eval: {{datasets: [{{name: a, path: {prompts}, input_key: prompt, max_prompt_len: 9}}]}}"
    )
    words = (
        f"--hf-checkpoint {tmp_path} --prompt-data {prompts} --input-key prompt --num-rollout 1 "
        "--rollout-batch-size 1 --rm-type random --actor-num-gpus-per-node 1 --eval-interval 1 "
        f"--rollout-max-context-len 9 --eval-config {write(tmp_path, text)}"
    )
    with pytest.raises(SystemExit):
        parse_config(words.split())
    assert "--eval-config, a: --rollout-max-prompt-len 9 leaves no room" in capsys.readouterr().err


def test_the_command_line_reports_all_problems_of_a_file_together(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    prompts = write_prompts(tmp_path / "q.jsonl", 2)
    text = "eval: {datasets: [{name: a, path: p, top_kk: 1}, {name: b}]}"
    words = (
        f"--hf-checkpoint {tmp_path} --prompt-data {prompts} --input-key prompt --num-rollout 1 "
        "--rollout-batch-size 1 --rm-type math --actor-num-gpus-per-node 1 --eval-interval 1 "
        f"--eval-config {write(tmp_path, text)}"
    )
    with pytest.raises(SystemExit):
        parse_config(words.split())
    said = capsys.readouterr().err
    assert "unknown key 'top_kk'. Did you mean top_k?" in said
    assert "datasets[1] has no path" in said
    with pytest.raises(SystemExit):
        parse_config([*words.split()[:-1], str(tmp_path / "none.yaml")])
    assert "cannot be read" in capsys.readouterr().err


def answer(prompt, params):
    """The prompt's digits in a box, which are the right answer; "B" for prompts with "c"."""
    if prompt[0] == ids_of("c")[0]:
        return [*ids_of("B"), 2], 0.001
    return [*ids_of("\\boxed{" + chr(28 + prompt[1]) + "}"), 2], 0.001


async def always_half(args, sample, **kwargs):
    assert sample.metadata["difficulty"] == "hard"
    return 0.5


def problems_of(cfg):
    return [*data_problems(cfg), *check_plugins(cfg), *check_rewards(cfg)]


def test_every_dataset_is_generated_and_graded_by_its_own_rules(hf, tmp_path, capsys):
    numbers = write_prompts(tmp_path / "numbers.jsonl", 6)
    choices = tmp_path / "choices.jsonl"
    rows = [{"ask": f"c{i}", "meta": {"correct_letter": "AB"[i % 2]}} for i in range(4)]
    choices.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = f"""
eval:
  defaults: {{n_samples_per_eval_prompt: 2, input_key: prompt}}
  datasets:
    - {{name: math, path: "{numbers}", rm_type: math, label_key: label, temperature: 0}}
    - {{name: mc, path: "{choices}@[1:]", input_key: ask, metadata_key: meta, rm_type: gpqa,
        max_response_len: 3, min_new_tokens: 1, stop: [x], n_samples_per_eval_prompt: 1}}
    - {{name: own, path: "{numbers}@[:2]", custom_rm_path: {__name__}.always_half,
        metadata_overrides: {{difficulty: hard}}}}
"""
    config = read_eval_config(write(tmp_path, text))
    cfg = make_config(hf, eval={"interval": 1, "config": config}, reward={"rm_type": "f1"})
    assert problems_of(cfg) == []
    with FakeEngine(answer) as engine:
        output = generate_rollout(engine.args(cfg), 3, None, evaluation=True)
        params = {body["token_ids"][0]: body["sampling_params"] for body in engine.log}
        assert len(engine.log) == 12 + 3 + 4
    mc = params[ids_of("c")[0]]
    assert (mc["max_tokens"], mc["min_tokens"], mc["stop"]) == (3, 1, ["x"])
    assert output.data["math"]["rewards"] == [1.0] * 12
    assert output.data["mc"]["rewards"] == [1.0, 0.0, 1.0]  # from the second row on
    assert output.data["own"]["rewards"] == [0.5] * 4
    assert output.metrics["eval/math-mean@2"] == output.metrics["eval/math"] == 1.0
    assert output.metrics["eval/mc"] == pytest.approx(2 / 3)
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["dataset", "math", "mc", "own"]
    assert "pass@2 1.000 ± 0.000" in table[1]


def one_argument(sample):
    return 1.0


def test_a_dataset_with_an_unknown_grader_or_hook_is_refused(tmp_path):
    prompts = write_prompts(tmp_path / "p.jsonl", 1)
    text = f"""
eval:
  datasets:
    - {{name: a, path: "{prompts}", input_key: prompt, rm_type: maths}}
    - {{name: b, path: "{prompts}", input_key: prompt, custom_rm_path: {__name__}.one_argument}}
    - {{name: c, path: "{prompts}", rm_type: math}}
"""
    config = read_eval_config(write(tmp_path, text))
    problems = problems_of(make_config("none", eval={"interval": 1, "config": config}))
    assert len(problems) == 4
    assert any("--eval-config, a: rm_type maths is unknown" in p for p in problems)
    assert any("no key 'input'" in p for p in problems)
    assert any(p.startswith("--eval-config, c: rm_type math compares") for p in problems)
    assert any(p.startswith("--eval-config, b:") and "Expected: async f(" in p for p in problems)


def test_confidence_intervals_come_from_the_differences_between_prompts():
    groups = [[Sample(response_length=2, status=Status.TRUNCATED)] * 2 for _ in range(4)]
    values = metrics.of_evaluation("x", groups, [[1, 1], [1, 0], [0, 0], [0, 0]])
    assert values["eval/x"] == 0.375
    assert values["eval/x-mean@2"] == 0.375
    std = (((1 - 0.375) ** 2 + 0.125**2 + 2 * 0.375**2) / 3) ** 0.5
    assert values["eval/x-ci95"] == pytest.approx(1.96 * std / 2)
    assert values["eval/x-pass@2"] == 0.5
    std = (4 * 0.25 / 3) ** 0.5
    assert values["eval/x-pass@2-ci95"] == pytest.approx(1.96 * std / 2)
    assert values["eval/x-truncated_ratio"] == 1.0
    one = metrics.of_evaluation("x", groups[:1], [[1, 0]])
    assert "eval/x-ci95" not in one

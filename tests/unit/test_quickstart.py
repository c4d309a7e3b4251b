"""The quickstart's data, tokenizer, stages and report."""

import json
import random
from itertools import islice

import pytest

from scripts.quickstart.data import problems, write_data
from scripts.quickstart.recipe import Recipe, latest_export
from scripts.quickstart.report import summarize
from scripts.quickstart.stages import Stage, run_stages
from scripts.quickstart.task import SHARE_RIGHT, Problem, boxed, draw_problem, solve


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder, seed=0)
    return {f.stem: [json.loads(line) for line in f.open()] for f in folder.glob("*.jsonl")}


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("transformers")
    from scripts.quickstart.model import make_tokenizer

    return make_tokenizer()


def question(row):
    return row.get("prompt", row.get("messages"))[0]["content"]


def test_careful_work_starts_with_the_units_and_ends_with_the_sum():
    work = solve(Problem(478, 356), random.Random(0), forget_carry=0, slip=0)
    assert work == "8+6+0=14\n7+5+1=13\n4+3+1=8\n\\boxed{834}"


def test_a_forgotten_carry_gives_the_sum_without_it():
    work = solve(Problem(478, 356), random.Random(0), forget_carry=1, slip=0)
    assert work == "8+6+0=14\n7+5+0=12\n4+3+0=7\n\\boxed{724}"


def test_careful_work_is_always_right():
    rng = random.Random(0)
    for _ in range(500):
        problem = draw_problem(rng)
        assert boxed(solve(problem, rng, forget_carry=0, slip=0)) == problem.label


def test_about_four_demonstrations_in_ten_are_right(data):
    right = 0
    for row in data["sft"]:
        a, b = question(row).removeprefix("What is ").rstrip("?").split("+")
        right += boxed(row["messages"][1]["content"]) == str(int(a) + int(b))
    assert abs(right / len(data["sft"]) - SHARE_RIGHT) < 0.02


def test_labels_are_the_true_sums_in_the_form_that_the_flags_expect(data):
    for row in data["train"] + data["eval"]:
        [message] = row["prompt"]
        assert message["role"] == "user"
        a, b = message["content"].removeprefix("What is ").rstrip("?").split("+")
        assert row["label"] == str(int(a) + int(b))


def test_held_out_problems_are_in_no_training_file(data):
    held_out = {question(row) for row in data["eval"]}
    assert len(held_out) == len(data["eval"]) == 256
    assert not held_out & {question(row) for row in data["train"] + data["sft"]}


def test_a_seed_fixes_the_data_and_another_seed_changes_it():
    assert [*islice(problems(3, "train"), 9)] == [*islice(problems(3, "train"), 9)]
    assert [*islice(problems(3, "train"), 9)] != [*islice(problems(4, "train"), 9)]
    assert [*islice(problems(3, "train"), 9)] != [*islice(problems(3, "sft"), 9)]


def test_the_tokenizer_restores_the_text(tokenizer, data):
    for row in data["sft"][:200]:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    odd = "Zürich, 2+2 = 4\n\ttabs"
    assert tokenizer.decode(tokenizer(odd)["input_ids"]) == odd


def test_every_digit_is_one_token(tokenizer):
    tokens = tokenizer.tokenize("9078+1234=10312")
    assert tokens == list("9078+1234=10312")


def test_the_chat_template_marks_turns_and_a_prompt_is_a_prefix_of_its_dialogue(tokenizer):
    user = {"role": "user", "content": "What is 478+356?"}
    pupil = {"role": "assistant", "content": "\\boxed{834}"}
    as_ids = {"tokenize": True, "return_dict": False}
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, **as_ids)
    dialogue = tokenizer.apply_chat_template([user, pupil], **as_ids)
    assert prompt == dialogue[: len(prompt)]
    assert tokenizer.decode(prompt) == (
        "<|im_start|>user\nWhat is 478+356?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert dialogue.count(tokenizer.eos_token_id) == 2
    assert tokenizer.decode([tokenizer.eos_token_id, tokenizer.pad_token_id]) == (
        "<|im_end|><|endoftext|>"
    )


def test_the_checkpoint_loads_as_a_qwen3_with_these_weights(tmp_path):
    pytest.importorskip("transformers")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from scripts.quickstart.model import VOCAB_SIZE, write_checkpoint

    write_checkpoint(tmp_path, seed=5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.dtype == torch.float32
    assert 600_000 < sum(p.numel() for p in model.parameters()) < 3_000_000
    assert len(tokenizer) <= VOCAB_SIZE == model.config.vocab_size
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.05, rel=0.05)


def stages_of(folder, calls, text="1"):
    def stage(name, inputs):
        def work():
            calls.append(name)
            (folder / name).write_text("made")

        return Stage(name, name, work, (folder / name,), inputs)

    return [stage("first", (text,)), stage("second", ())]


def run_quietly(folder, calls, **kw):
    return run_stages(stages_of(folder, calls, **kw), folder / "stages", lambda words: None)


def test_finished_stages_are_skipped(tmp_path):
    calls = []
    run_quietly(tmp_path, calls)
    done = run_quietly(tmp_path, calls)
    assert calls == ["first", "second"]
    assert all(d.reused for d in done)


def test_a_change_repeats_the_stage_and_all_later_stages(tmp_path):
    calls = []
    run_quietly(tmp_path, calls)
    run_quietly(tmp_path, calls, text="2")
    assert calls == ["first", "second"] * 2


def test_a_stage_whose_output_is_gone_is_repeated(tmp_path):
    calls = []
    run_quietly(tmp_path, calls)
    (tmp_path / "second").unlink()
    run_quietly(tmp_path, calls)
    assert calls == ["first", "second", "second"]


def test_an_interrupted_stage_is_repeated_without_its_partial_output(tmp_path):
    def cut_off():
        (tmp_path / "out").write_text("half")
        raise KeyboardInterrupt

    def whole():
        assert not (tmp_path / "out").exists()
        (tmp_path / "out").write_text("whole")

    def run(work):
        stage = Stage("s", "s", work, (tmp_path / "out",), ())
        run_stages([stage], tmp_path / "stages", lambda words: None)

    with pytest.raises(KeyboardInterrupt):
        run(cut_off)
    run(whole)
    assert (tmp_path / "out").read_text() == "whole"


def test_a_stage_without_output_is_an_error(tmp_path):
    stage = Stage("s", "s", lambda: None, (tmp_path / "out",), ())
    with pytest.raises(FileNotFoundError, match="out"):
        run_stages([stage], tmp_path / "stages", lambda words: None)


def test_the_latest_export_has_the_highest_number(tmp_path):
    for name in ("9", "59", "notes"):
        (tmp_path / name).mkdir()
    assert latest_export(tmp_path).name == "59"
    with pytest.raises(FileNotFoundError):
        latest_export(tmp_path / "nothing")


def test_the_summary_has_the_first_and_the_last_evaluation():
    records = [
        {"step": 0, "eval/addition": 0.3, "eval/addition-truncated_ratio": 0.0},
        {"step": 5, "eval/addition": 0.6, "rollout/raw_reward": 0.5},
        {"step": 10, "eval/addition": 0.9, "rollout/raw_reward": 0.8},
    ]
    expected = {"eval_before": 0.3, "eval_after": 0.9, "num_rollout": 10}
    assert summarize(records) == expected
    with pytest.raises(ValueError, match="before the first rollout"):
        summarize(records[1:])


def test_the_command_to_continue_names_the_same_folder(tmp_path):
    command = Recipe(tmp_path / "a b", seed=2).continue_command(60)
    assert f"RUN_DIR='{tmp_path}/a b'" in command
    assert "NUM_ROLLOUT=120" in command
    assert "SEED=2" in command
    assert "scripts/run-tiny-cpu.sh" in command


def test_the_flags_of_the_warm_up_parse_and_make_one_pass_over_its_data(tmp_path):
    pytest.importorskip("transformers")
    from vime.cli import parse_config

    recipe = Recipe(tmp_path, seed=0)
    recipe.make_assets()
    cfg = parse_config(recipe.sft_command()[2:])
    num_rows = len((tmp_path / "data/sft.jsonl").read_text().splitlines())
    assert cfg.batch.prompts * cfg.batch.num_rollout == num_rows
    assert cfg.checkpoint.save_interval == cfg.batch.num_rollout

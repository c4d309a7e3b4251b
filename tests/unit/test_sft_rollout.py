import json

import pytest

from tests.unit.fake_engine import ids_of, make_config
from vime.config.view import ArgsView
from vime.errors import ConfigError
from vime.rollout.data_source import RolloutDataSourceWithBuffer
from vime.rollout.sft_rollout import generate_rollout


def rollout(hf, tmp_path, rows, evaluation=False, **sections):
    path = tmp_path / "sft.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"prompt_data": str(path), "input_key": "prompt"}
    sections["data"] = data | sections.get("data", {})
    cfg = make_config(hf, algorithm={"loss_type": "sft_loss"}, **sections)
    args = ArgsView(cfg)
    return generate_rollout(args, 3, RolloutDataSourceWithBuffer(args), evaluation)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def learned(sample):
    response = sample.tokens[-sample.response_length :]
    return [t for t, m in zip(response, sample.loss_mask, strict=True) if m]


def test_loss_falls_on_the_assistants_turns(hf, tmp_path):
    rows = [
        {"prompt": [user("1+1"), assistant("2")]},
        {"prompt": [user("a"), assistant("b"), user("c"), assistant("d")]},
    ]
    output = rollout(hf, tmp_path, rows, data={"apply_chat_template": True})
    (one,), (two,) = output.samples
    assert learned(one) == [*ids_of("2"), 2]
    assert one.response == "2<|im_end|>"
    assert one.rollout_id == 3
    assert learned(two) == [*ids_of("b"), 2, *ids_of("d"), 2]
    assert two.loss_mask[0] == two.loss_mask[-1] == 1


def test_a_prompt_and_its_label_are_a_demonstration(hf, tmp_path):
    rows = [{"prompt": [user("1+1")], "label": "2"}, {"prompt": "1+2", "label": "3"}]
    data = {"apply_chat_template": True, "label_key": "label"}
    (one,), (two,) = rollout(hf, tmp_path, rows, data=data).samples
    assert learned(one) == [*ids_of("2"), 2]
    assert learned(two) == [*ids_of("3"), 2]
    for sample, question in ((one, "1+1"), (two, "1+2")):
        asked = sample.tokens[: -sample.response_length]
        assert asked == [
            1,
            *ids_of(f"user\n{question}"),
            2,
            *ids_of("\n"),
            1,
            *ids_of("assistant\n"),
        ]


def test_plain_text_ends_with_the_end_of_text(hf, tmp_path):
    rows = [{"prompt": "1+1=", "label": "2"}]
    (sample,), _ = rollout(hf, tmp_path, rows, data={"label_key": "label"}).samples
    assert sample.tokens == [*ids_of("1+1=2"), 2]
    assert sample.loss_mask == [1, 1]


def test_long_demonstrations_are_skipped_and_counted(hf, tmp_path):
    rows = [{"prompt": "1=", "label": "x" * n} for n in (3, 50, 3)]
    data = {"label_key": "label"}
    output = rollout(hf, tmp_path, rows, data=data, rollout={"max_context_len": 10})
    assert [len(g[0].tokens) for g in output.samples] == [6, 6]
    assert output.metrics["rollout/skipped_long"] == 1
    with pytest.raises(ConfigError, match="--rollout-max-context-len 2 skips every"):
        rollout(hf, tmp_path, rows, data=data, rollout={"max_context_len": 2})


def test_a_demonstration_without_an_answer_and_an_evaluation_are_refused(hf, tmp_path):
    with pytest.raises(ConfigError, match="--label-key"):
        rollout(hf, tmp_path, [{"prompt": [user("1+1")]}])
    with pytest.raises(ConfigError, match="--eval-function-path"):
        rollout(hf, tmp_path, [{"prompt": "x"}], evaluation=True)

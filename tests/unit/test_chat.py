import pytest

from tests.unit.fake_engine import ids_of, make_config, write_tokenizer
from vime.data import chat
from vime.data.checks import check_chat_template
from vime.errors import ConfigError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return chat.load_tokenizer(str(write_tokenizer(tmp_path_factory.mktemp("tok"))))


def test_a_string_stands_for_one_user_message(tokenizer):
    text = chat.render(tokenizer, "hi")
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text == chat.render(tokenizer, [{"role": "user", "content": "hi"}])


def test_an_answer_that_has_been_begun_is_continued(tokenizer):
    talk = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "It is"}]
    asked = "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n"
    assert chat.render_prompt(tokenizer, talk) == asked + "It is"
    assert chat.render_prompt(tokenizer, talk[:1]) == asked
    assert chat.render_prompt(tokenizer, "2+2") == asked


def test_encode_and_decode_are_inverse_and_special_tokens_can_be_left_out(tokenizer):
    (ids,) = chat.encode(tokenizer, ["a b\n<|im_end|>"])
    assert ids == [*ids_of("a b\n"), 2]
    assert chat.decode(tokenizer, ids) == "a b\n<|im_end|>"
    assert chat.decode(tokenizer, ids, skip_special_tokens=True) == "a b\n"


def test_the_mask_covers_every_assistant_turn_with_its_end_mark_and_nothing_else(tokenizer):
    talk = [
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "and 4"},
        {"role": "assistant", "content": "no 4"},
    ]
    tokens, mask = chat.assistant_tokens(tokenizer, talk)
    learned = [t for t, m in zip(tokens, mask, strict=True) if m]
    assert learned == [*ids_of("4"), 2, *ids_of("no 4"), 2]
    before = chat.encode(tokenizer, [chat.render(tokenizer, talk[:1])])[0]
    assert tokens[: len(before)] == before


def test_a_conversation_without_an_answer_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="without an assistant message"):
        chat.assistant_tokens(tokenizer, [{"role": "user", "content": "x"}])


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    plain = tokenizer.chat_template
    tokenizer.chat_template = "{{ messages | length }}" + plain
    try:
        with pytest.raises(ConfigError, match="differently"):
            chat.assistant_tokens(
                tokenizer,
                [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
            )
    finally:
        tokenizer.chat_template = plain


def test_a_folder_without_a_template_is_told_before_anything_starts(tmp_path):
    cfg = make_config(write_tokenizer(tmp_path / "a"), data={"apply_chat_template": True})
    assert check_chat_template(cfg) == []
    for file in (tmp_path / "a").glob("chat_template.*"):
        file.unlink()
    (problem,) = check_chat_template(cfg)
    assert problem.startswith(f"--apply-chat-template: --hf-checkpoint {tmp_path}/a has no chat")
    (tmp_path / "a" / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert check_chat_template(cfg) == []  # where older checkpoints have it
    assert check_chat_template(make_config(tmp_path / "none")) == []

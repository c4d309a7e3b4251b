import importlib.util
from pathlib import Path

import pytest

from tests.unit.fake_engine import ids_of, make_config, write_tokenizer
from vime.data import chat
from vime.data.checks import check_chat_template
from vime.errors import ConfigError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return chat.load_tokenizer(str(write_tokenizer(tmp_path_factory.mktemp("tok"))))


def test_a_string_is_one_user_message(tokenizer):
    text = chat.render(tokenizer, "hi")
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text == chat.render(tokenizer, [{"role": "user", "content": "hi"}])


def test_a_begun_answer_is_continued(tokenizer):
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


def test_the_mask_covers_exactly_the_assistant_turns_with_their_end_marks(tokenizer):
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
        with pytest.raises(ConfigError, match="template changes the messages"):
            chat.assistant_tokens(
                tokenizer,
                [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
            )
    finally:
        tokenizer.chat_template = plain


ASK = {"role": "user", "content": "2+2?"}
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"x": 2}}}]
TOOL = {"role": "tool", "content": "4"}
SAYS_4 = {"role": "assistant", "content": "It is 4."}
QWEN_CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 2}}\n</tool_call><|im_end|>'


def published(name):
    """A chat template as its model's folder has it; TRL ships copies."""
    trl = importlib.util.find_spec("trl")
    if trl is None:
        pytest.skip("needs the package trl, which has copies of published chat templates")
    folder = Path(trl.origin).parent / "chat_templates"
    return (folder / f"{name}.jinja").read_text()


@pytest.fixture
def templated(tmp_path):
    """A tokenizer with a published template and end-of-sequence token."""

    def make(name, eos=None):
        tokenizer = chat.load_tokenizer(str(write_tokenizer(tmp_path / name)))
        tokenizer.chat_template = published(name)
        if eos is not None:
            tokenizer.eos_token = eos
        return tokenizer

    return make


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


# (template, end-of-sequence token if another, messages, what is learned)
LEARNED = {
    "the answer stands in the reasoning too": (
        "qwen3",
        None,
        [ASK, assistant("4", reasoning_content="so 4 it is")],
        "<think>\nso 4 it is\n</think>\n\n4<|im_end|>",
    ),
    "the template writes an empty think block": (
        "qwen3",
        None,
        [ASK, assistant("think")],
        "<think>\n\n</think>\n\nthink<|im_end|>",
    ),
    "the template drops the reasoning of earlier turns": (
        "qwen3",
        None,
        [ASK, assistant("4", reasoning_content="hm"), ASK, assistant("5")],
        "4<|im_end|><think>\n\n</think>\n\n5<|im_end|>",
    ),
    "a tool call behind a sentence": (
        "qwen2_5",
        None,
        [ASK, assistant("Let me compute.", tool_calls=CALL), TOOL, SAYS_4],
        f"Let me compute.\n{QWEN_CALL}It is 4.<|im_end|>",
    ),
    "a tool call without text": (
        "qwen2_5",
        None,
        [ASK, assistant("", tool_calls=CALL), TOOL, SAYS_4],
        f"{QWEN_CALL}It is 4.<|im_end|>",
    ),
    "a base model's end of sequence is not the template's end mark": (
        "qwen2_5",
        "<|endoftext|>",
        [ASK, assistant("4")],
        "4<|im_end|>",
    ),
    "an end mark inside a question": (
        "qwen2_5",
        None,
        [ASK, assistant("4"), {"role": "user", "content": "4<|im_end|>?"}, assistant("4")],
        "4<|im_end|>4<|im_end|>",
    ),
    "another family's end mark": (
        "gemma3",
        None,
        [ASK, assistant("4"), ASK, assistant("2+2?")],
        "4<end_of_turn>2+2?<end_of_turn>",
    ),
}


@pytest.mark.parametrize("case", LEARNED)
def test_a_turn_is_learned_whole(templated, case, monkeypatch):
    template, eos, messages, expected = LEARNED[case]
    tokenizer = templated(template, eos)
    text = chat.render(tokenizer, messages, add_generation_prompt=False)
    monkeypatch.setattr(chat, "encode", lambda _, pieces: [list(piece) for piece in pieces])
    letters, mask = chat.assistant_tokens(tokenizer, messages)
    learned = "".join(letter for letter, m in zip(letters, mask, strict=True) if m)
    assert learned == expected
    whole = "".join(letters)
    assert text.startswith(whole)
    assert not text[len(whole) :].strip()


REFUSED = {
    "tool calls that the template leaves out": (
        "lfm2",
        [ASK, assistant("", tool_calls=CALL), TOOL, SAYS_4],
        "leaves out the messages' tool_calls",
    ),
    "no end mark": ("glm4moe", [ASK, assistant("4")], "writes no end mark"),
    "a generation prompt that is not in the conversation": (
        "deepseekv3",
        [ASK, assistant("4")],
        "changes the messages before",
    ),
    "roles that the template refuses": ("gemma3", [ASK, ASK], "refuses the messages"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_conversation_whose_turns_cannot_be_told_is_refused(templated, case):
    template, messages, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        chat.assistant_tokens(templated(template), messages)


def test_text_parts_reach_a_template_that_takes_strings(templated):
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "2+2?"}]
    messages = [{"role": "user", "content": parts}]
    joined = [{"role": "user", "content": "What is\n2+2?"}]
    tokenizer = templated("qwen3")
    assert chat.render(tokenizer, messages) == chat.render(tokenizer, joined)
    assert "What is2+2?" in chat.render(templated("gemma3"), messages)  # it reads parts itself
    image = [{"role": "user", "content": [{"type": "image", "url": "x"}]}]
    with pytest.raises(ConfigError, match="parts of type image"):
        chat.render(tokenizer, image)


def test_a_folder_without_a_template_is_refused_before_anything_starts(tmp_path):
    cfg = make_config(write_tokenizer(tmp_path / "a"), data={"apply_chat_template": True})
    assert check_chat_template(cfg) == []
    for file in (tmp_path / "a").glob("chat_template.*"):
        file.unlink()
    (problem,) = check_chat_template(cfg)
    assert problem.startswith(f"--apply-chat-template: --hf-checkpoint {tmp_path}/a has no chat")
    (tmp_path / "a" / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert check_chat_template(cfg) == []  # older checkpoints have it there
    assert check_chat_template(make_config(tmp_path / "none")) == []

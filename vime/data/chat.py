"""Chat messages as text and as token ids, and the mask of the assistant's tokens."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from vime.errors import ConfigError

Messages = list[dict[str, Any]]


class TemplateRefusal(ConfigError):
    """The chat template cannot render these messages. Other rows of the file may be fine."""


@lru_cache(maxsize=4)
def load_tokenizer(hf_checkpoint: str) -> Any:
    """The tokenizer of an HF folder, loaded once per process."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(hf_checkpoint)


def render(
    tokenizer: Any,
    prompt: str | Messages,
    *,
    tools: list[dict[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> str:
    """The text of the chat template. A string is one user message.

    continue_final_message  the last message is the beginning of the assistant's answer: the text
                            ends with it and has no end mark behind it
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = _joined_parts(tokenizer, messages)
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "--apply-chat-template: the tokenizer of --hf-checkpoint has no chat template. Add "
            "chat_template.jinja to the folder, or give prompts as strings without the flag."
        )
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            **dict(template_kwargs or {}),
        )
    except Exception as error:  # a template may raise any error on messages that it does not expect
        raise TemplateRefusal(
            f"the chat template refuses the messages: {type(error).__name__}: {error}. Correct the "
            "messages, or use a template that takes them."
        ) from error


def _joined_parts(tokenizer: Any, messages: Messages) -> Messages:
    """The messages, with lists of text parts joined if the template takes only strings.

    Content may be a list of parts, as in OpenAI's format. A template for strings would drop it.
    """
    if not any(isinstance(m.get("content"), list) for m in messages):
        return messages
    if _reads_parts(tokenizer.chat_template):
        return messages
    return [{**m, "content": _joined(m.get("content"))} for m in messages]


def _joined(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    texts = [part if isinstance(part, str) else part.get("text") for part in content]
    if not all(isinstance(text, str) for text in texts):
        kinds = sorted({str(part.get("type")) for part in content if isinstance(part, dict)})
        raise TemplateRefusal(
            f"a message has content parts of type {', '.join(kinds)}, and the chat template takes "
            "text only. Give text, or a model whose template takes such parts."
        )
    return "\n".join(texts)  # like vLLM's chat server


@lru_cache(maxsize=16)
def _reads_parts(template: Any) -> bool:
    """Whether a chat template loops over the parts of a message's content."""
    return isinstance(template, str) and _PARTS_LOOP.search(template) is not None


_PARTS_LOOP = re.compile(r"for\s+\w+\s+in\s+[\w.\[\]'\"]*content\b")


def render_prompt(
    tokenizer: Any,
    prompt: str | Messages,
    *,
    tools: list[dict[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The text for the engine. It begins an assistant's turn, or continues the last message's."""
    begun = not isinstance(prompt, str) and bool(prompt) and prompt[-1].get("role") == "assistant"
    return render(
        tokenizer,
        prompt,
        tools=tools,
        template_kwargs=template_kwargs,
        continue_final_message=begun,
    )


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens in front or behind."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def decode(tokenizer: Any, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    """The text of a response. The Rust tokenizer is called directly, which is 4 times cheaper."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
    return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)


def assistant_tokens(
    tokenizer: Any,
    messages: Messages,
    *,
    tools: list[dict[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[int], list[int]]:
    """(token ids, mask) of a conversation. The mask is 1 on the tokens of assistant turns.

    A turn is the template's text between the generation prompt and the end mark, end mark included:
    reasoning, text and tool calls. The pieces are encoded one by one, so that the text before an
    answer has the same tokens as in a rollout. Raises TemplateRefusal when the template does not
    show the end of a turn.
    """
    kwargs = {"tools": tools, "template_kwargs": template_kwargs}
    text = render(tokenizer, messages, add_generation_prompt=False, **kwargs)
    if any(m.get("tool_calls") for m in messages):
        without = [{k: v for k, v in m.items() if k != "tool_calls"} for m in messages]
        if render(tokenizer, without, add_generation_prompt=False, **kwargs) == text:
            raise TemplateRefusal(
                "the chat template leaves out the messages' tool_calls, so the model could not "
                "learn them. Use a template that writes them."
            )
    pieces: list[str] = []
    marks: list[int] = []
    at = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        head = render(tokenizer, messages[:i], **kwargs)
        if not text.startswith(head) or len(head) < at:
            raise TemplateRefusal(
                f"the chat template changes the messages before message {i} when the answer "
                "follows, so the assistant's tokens cannot be found. Give conversations whose last "
                "message is their only assistant turn."
            )
        end = _turn_end(tokenizer, text, len(head), messages, i, kwargs)
        pieces += [text[at : len(head)], text[len(head) : end]]
        marks += [0, 1]
        at = end
    if not pieces:
        raise TemplateRefusal("a conversation without an assistant message has nothing to learn.")
    ids = encode(tokenizer, pieces)
    tokens = [token for piece in ids for token in piece]
    mask = [mark for piece, mark in zip(ids, marks, strict=True) for _ in piece]
    return tokens, mask


# Two texts that differ in their first character. No template treats them specially.
_PROBES = ("\ue000", "\ue001")


def _turn_end(
    tokenizer: Any, text: str, start: int, messages: Messages, i: int, kwargs: dict[str, Any]
) -> int:
    """The position in `text` after the end mark of message `i`, whose turn begins at `start`.

    The turn ends with the last end mark before the next message's content.
    """
    mark = end_mark(tokenizer, kwargs["template_kwargs"])
    limit = len(text)
    if i + 1 < len(messages):
        following = [
            [*messages[: i + 1], {**messages[i + 1], "content": probe}, *messages[i + 2 :]]
            for probe in _PROBES
        ]
        rendered = [render(tokenizer, m, add_generation_prompt=False, **kwargs) for m in following]
        limit = len(os.path.commonprefix([text, *rendered]))
        if rendered[0] == rendered[1]:
            raise TemplateRefusal(
                f"the chat template leaves out the content of message {i + 1}, so the end of the "
                "assistant's turn before it cannot be found. Use a template that writes it."
            )
    found = text.rfind(mark, start, limit)
    rest = text[found + len(mark) :] if found >= 0 else text
    if found < 0 or (i + 1 == len(messages) and rest.strip() and not _is_special(tokenizer, rest)):
        raise TemplateRefusal(
            f"the chat template does not end message {i} with {mark!r}, so the end of the "
            "assistant's turn cannot be found. Correct the template."
        )
    return found + len(mark)


def end_mark(tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> str:
    """The text that the chat template writes after an assistant's answer, such as `<|im_end|>`.

    Raises TemplateRefusal if the template writes none, because a model would not learn to stop.
    """
    question, answer = _PROBES
    talk = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text = render(tokenizer, talk, template_kwargs=template_kwargs, add_generation_prompt=False)
    tail = text.rpartition(answer)[2].strip()
    special = [mark for mark in _special_tokens(tokenizer) if tail.startswith(mark)]
    mark = max(special, key=len) if special else tail
    if not mark:
        raise TemplateRefusal(
            "the chat template writes no end mark after an assistant's answer, so a model could "
            "not learn to stop. Use a template that ends each turn."
        )
    return mark


def _special_tokens(tokenizer: Any) -> set[str]:
    return {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}


def _is_special(tokenizer: Any, text: str) -> bool:
    """Whether the text is one special token, such as an end of sequence after the turn."""
    return text.strip() in _special_tokens(tokenizer)

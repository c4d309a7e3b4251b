"""Messages to text to token ids, and which of the tokens an assistant wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from vime.errors import ConfigError

Messages = list[dict[str, Any]]


@lru_cache(maxsize=4)
def load_tokenizer(hf_checkpoint: str) -> Any:
    """The tokenizer of an HF folder, loaded once a process."""
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
    """The chat template's text. A string stands for one user message.

    continue_final_message  the last message is what the assistant has begun to say: the text ends
                            with it, without a mark of its end
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "--apply-chat-template: the tokenizer of --hf-checkpoint has no chat template. Add "
            "chat_template.jinja to the folder, or give prompts as strings without the flag."
        )
    return tokenizer.apply_chat_template(
        messages,
        tools=tools,
        tokenize=False,
        add_generation_prompt=add_generation_prompt and not continue_final_message,
        continue_final_message=continue_final_message,
        **dict(template_kwargs or {}),
    )


def render_prompt(
    tokenizer: Any,
    prompt: str | Messages,
    *,
    tools: list[dict[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """What the engine is to continue: an assistant's turn, the last message's if it is one."""
    begun = not isinstance(prompt, str) and bool(prompt) and prompt[-1].get("role") == "assistant"
    return render(
        tokenizer,
        prompt,
        tools=tools,
        template_kwargs=template_kwargs,
        continue_final_message=begun,
    )


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text as it stands: nothing is added in front or behind."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def decode(tokenizer: Any, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    """The text of a response. Uses the Rust tokenizer directly, 4 times cheaper a call."""
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
    """(token ids, mask) of a conversation; the mask is 1 on what an assistant turn generates.

    That is the turn's text with its end mark, without the header that the generation prompt
    supplies. The pieces are encoded one by one, so that what precedes an answer is encoded exactly
    as it is when a model is asked for that answer.
    """
    kwargs = {"tools": tools, "template_kwargs": template_kwargs}
    text = render(tokenizer, messages, add_generation_prompt=False, **kwargs)
    pieces: list[str] = []
    marks: list[int] = []
    at = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        head = render(tokenizer, messages[:i], **kwargs)
        if not text.startswith(head):
            raise ConfigError(
                f"the chat template writes the messages before message {i} differently once the "
                "answer follows, so what the assistant generates cannot be told apart. Give "
                "conversations whose last message is their only assistant turn."
            )
        end = _turn_end(tokenizer, text, len(head), messages[: i + 1], kwargs)
        pieces += [text[at : len(head)], text[len(head) : end]]
        marks += [0, 1]
        at = end
    if not pieces:
        raise ConfigError("a conversation without an assistant message has nothing to learn from.")
    ids = encode(tokenizer, pieces)
    tokens = [token for piece in ids for token in piece]
    mask = [mark for piece, mark in zip(ids, marks, strict=True) for _ in piece]
    return tokens, mask


def _turn_end(tokenizer: Any, text: str, start: int, upto: Messages, kwargs: dict) -> int:
    """Where in `text` the turn that begins at `start` ends, its end mark included."""
    content = upto[-1].get("content")
    said = content.strip() if isinstance(content, str) else None
    found = -1 if said is None else text.find(said, start)
    if said is not None and found >= 0:
        end = found + len(said)
    else:  # tool calls, or content in parts: trust the template
        through = render(tokenizer, upto, add_generation_prompt=False, **kwargs)
        if not text.startswith(through):
            raise ConfigError("the chat template rewrites an assistant turn that is not the last.")
        return len(through.rstrip())
    mark = tokenizer.eos_token
    if mark:
        after = len(text) - len(text[end:].lstrip())
        if text.startswith(mark, after):
            return after + len(mark)
    return end

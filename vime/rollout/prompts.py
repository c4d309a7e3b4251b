"""Renders the prompts of a file for the engine and makes pending samples of them."""

from __future__ import annotations

import copy
import logging
from typing import Any

from vime.config import Config
from vime.data import chat
from vime.data.datasets import Row
from vime.errors import ConfigError
from vime.types import Sample

logger = logging.getLogger(__name__)

Rendered = tuple[Row, Any, list[int]]  # a row, its prompt as text or messages, its token ids


def render_rows(cfg: Config, rows: list[Row]) -> list[Rendered]:
    """The rows' prompts as text and token ids for the engine.

    Leaves out the rows that the chat template refuses, each with a warning that names its place.
    """
    tokenizer = chat.load_tokenizer(cfg.model.hf_checkpoint)
    texts: list[tuple[Row, str]] = []
    for row in rows:
        if not cfg.data.apply_chat_template and isinstance(row.prompt, str):
            texts.append((row, row.prompt))
            continue
        if not cfg.data.apply_chat_template:
            raise ConfigError(
                f"{row.where}: the prompt is a list of messages and needs --apply-chat-template."
            )
        kwargs = cfg.data.apply_chat_template_kwargs
        try:
            text = chat.render_prompt(
                tokenizer, row.prompt, tools=row.tools, template_kwargs=kwargs
            )
        except chat.TemplateRefusal as error:
            logger.warning("%s is left out: %s", row.where, error)
        else:
            texts.append((row, text))
    ids = chat.encode(tokenizer, [text for _, text in texts])
    return [(row, text, i) for (row, text), i in zip(texts, ids, strict=True)]


def to_sample(row: Row, prompt: Any, ids: list[int], *, group_index: int, index: int) -> Sample:
    """A pending sample with its own copies of all mutable values."""
    metadata = copy.deepcopy(row.metadata)
    if row.tools:
        metadata.setdefault("tools", copy.deepcopy(row.tools))
    return Sample(
        group_index=group_index,
        index=index,
        prompt=copy.deepcopy(prompt),
        tokens=list(ids),
        label=row.label,
        metadata=metadata,
    )

"""Checks of prompt files and chat template, before anything starts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from vime.config import Config
from vime.config.evaluation import eval_datasets
from vime.data.datasets import check_prompt_data


def data_problems(cfg: Config) -> Iterator[str]:
    """Problems of --prompt-data and of evaluation files, with file, line number and key."""
    data = cfg.data
    if data.prompt_data is not None:
        yield from check_prompt_data(
            data.prompt_data,
            input_key=data.input_key,
            label_key=data.label_key,
            metadata_key=data.metadata_key,
            tool_key=data.tool_key,
            # supervised fine-tuning always renders messages
            apply_chat_template=data.apply_chat_template or not cfg.algorithm.needs_reward,
        )
    for dataset in eval_datasets(cfg):
        yield from check_prompt_data(
            dataset.path,
            input_key=dataset.cfg.data.input_key,
            label_key=dataset.cfg.data.label_key,
            metadata_key=dataset.cfg.data.metadata_key,
            tool_key=dataset.cfg.data.tool_key,
            apply_chat_template=dataset.cfg.data.apply_chat_template,
            flag="--eval-prompt-data" if cfg.eval.config is None else "--eval-config",
        )


def check_chat_template(cfg: Config) -> list[str]:
    """--apply-chat-template needs a template, in one of the files that transformers reads."""
    folder = Path(cfg.model.hf_checkpoint)
    if not cfg.data.apply_chat_template or cfg.debug.dry_run or not folder.is_dir():
        return []
    if any(folder.glob("chat_template.*")) or (folder / "additional_chat_templates").is_dir():
        return []
    try:
        if json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template"):
            return []
    except (OSError, ValueError, AttributeError):
        pass  # such a file has no template
    return [
        f"--apply-chat-template: --hf-checkpoint {folder} has no chat template. Add "
        "chat_template.jinja to the folder, or give prompts as strings without the flag."
    ]

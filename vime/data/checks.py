"""Checks of prompt files and chat template, before anything starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from vime.config import Config
from vime.config.evaluation import eval_datasets
from vime.config.sections.rollout import ENGINE_ROLLOUTS
from vime.data.datasets import Row, check_prompt_data
from vime.rollout.rm_hub.registry import grader_of


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
            row_problem=_graders_problem(cfg) if cfg.algorithm.needs_reward else None,
        )
    for dataset in eval_datasets(cfg):
        yield from check_prompt_data(
            dataset.path,
            input_key=dataset.cfg.data.input_key,
            label_key=dataset.cfg.data.label_key,
            metadata_key=dataset.cfg.data.metadata_key,
            tool_key=dataset.cfg.data.tool_key,
            apply_chat_template=dataset.cfg.data.apply_chat_template,
            row_problem=_graders_problem(dataset.cfg),
            flag="--eval-prompt-data" if cfg.eval.config is None else "--eval-config",
        )


def _graders_problem(cfg: Config) -> Callable[[Row], str | None] | None:
    """Asks a row's grader about it; None if a function of the user may grade or change the row."""
    own = cfg.reward.custom_rm_path or cfg.rollout.custom_generate_path
    if own or cfg.rollout.function_path not in ENGINE_ROLLOUTS:
        return None

    def problem(row: Row) -> str | None:
        rm_type = row.metadata.get("rm_type") or cfg.reward.rm_type
        grader = grader_of(rm_type) if isinstance(rm_type, str) else None
        if grader is None or grader.row_problem is None:
            return None
        return grader.row_problem(row.label, row.metadata)

    return problem


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

"""The prompt files, read before anything starts: malformed lines and keys that the data lacks."""

from __future__ import annotations

from collections.abc import Iterator

from vime.config import Config
from vime.config.evaluation import eval_datasets
from vime.data.datasets import check_prompt_data


def data_problems(cfg: Config) -> Iterator[str]:
    """Problems of --prompt-data and of every evaluated file: file, line number, key."""
    data = cfg.data
    if data.prompt_data is not None:
        yield from check_prompt_data(
            data.prompt_data,
            input_key=data.input_key,
            label_key=data.label_key,
            metadata_key=data.metadata_key,
            tool_key=data.tool_key,
            # sft_loss renders conversations by itself
            apply_chat_template=data.apply_chat_template or cfg.algorithm.loss_type == "sft_loss",
        )
    for dataset in eval_datasets(cfg):
        yield from check_prompt_data(
            dataset.path,
            input_key=dataset.input_key,
            label_key=dataset.label_key,
            metadata_key=dataset.metadata_key,
            tool_key=dataset.tool_key,
            apply_chat_template=dataset.apply_chat_template,
            flag="--eval-prompt-data" if cfg.eval.config is None else "--eval-config",
        )

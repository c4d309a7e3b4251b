"""The prompt files, read before anything starts: malformed lines and keys that the data lacks."""

from __future__ import annotations

from collections.abc import Iterator

from vime.config import Config
from vime.data.datasets import check_prompt_data


def data_problems(cfg: Config) -> Iterator[str]:
    """Problems of --prompt-data and --eval-prompt-data: file, line number, key."""
    data, evaluation = cfg.data, cfg.eval
    common = {
        "metadata_key": data.metadata_key,
        "tool_key": data.tool_key,
        "apply_chat_template": data.apply_chat_template,
    }
    if data.prompt_data is not None:
        yield from check_prompt_data(
            data.prompt_data, input_key=data.input_key, label_key=data.label_key, **common
        )
    for path in evaluation.datasets.values():
        yield from check_prompt_data(
            path,
            input_key=evaluation.input_key or data.input_key,
            label_key=evaluation.label_key or data.label_key,
            flag="--eval-prompt-data",
            **common,
        )

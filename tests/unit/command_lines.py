"""Command lines for tests of the configuration, with files that exist and flags that parse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vime.cli import parse_config
from vime.config import Config

QWEN3_TINY = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 288,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}

Flags = dict[str, str | None]  # None: a switch; "": leave the flag out


def write_checkpoint(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(QWEN3_TINY | changes))
    return folder


def write_prompts(path: Path, num_rows: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"prompt": [{"role": "user", "content": "1+1?"}], "label": "2"}
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(num_rows)))
    return path


def words(folder: Path, changes: Flags) -> list[str]:
    """A command line that parses, with `changes` applied. Values are split at spaces."""
    flags: Flags = {
        "--hf-checkpoint": str(write_checkpoint(folder / "hf")),
        "--prompt-data": str(write_prompts(folder / "train.jsonl")),
        "--input-key": "prompt",
        "--label-key": "label",
        "--apply-chat-template": None,
        "--rm-type": "math",
        "--rollout-batch-size": "32",
        "--n-samples-per-prompt": "8",
        "--num-rollout": "3",
    } | changes
    kept = {name: value for name, value in flags.items() if value != ""}
    return [w for name, v in kept.items() for w in ([name] if v is None else [name, *v.split()])]


def refusal(capsys: pytest.CaptureFixture, parse: Callable[[], Config]) -> list[str]:
    """The problems that `parse` prints before it exits with code 2."""
    with pytest.raises(SystemExit) as stopped:
        parse()
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    return [line.removeprefix("  - ") for line in lines if line.startswith("  - ")]


def refused(capsys: pytest.CaptureFixture, folder: Path, changes: Flags) -> list[str]:
    return refusal(capsys, lambda: parse_config(words(folder, changes)))

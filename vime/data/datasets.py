"""Prompt files: rows with prompt, label, metadata and tools, and the check of every row.

A path may end in a slice as in Python: `prompts.jsonl@[100:200]`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vime.data.row_files import JsonlRows, ParquetRows, parse_json, shorten
from vime.errors import ConfigError

_SLICE = re.compile(r"^(?P<path>.+)@\[(?P<start>-?\d*):(?P<stop>-?\d*)\]$")
_ROWS_CHECKED_IN_FULL = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class DataKeys:
    """The names of a row's fields. A named label must exist; metadata and tools may be missing."""

    input: str = "input"
    label: str | None = None
    metadata: str | None = "metadata"
    tools: str | None = "tools"

    @property
    def required(self) -> list[str]:
        return [self.input] + ([self.label] if self.label else [])

    @property
    def all(self) -> list[str]:
        return self.required + [key for key in (self.metadata, self.tools) if key]


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt with its label, metadata and tools."""

    prompt: str | list[dict[str, Any]]
    label: str | None
    metadata: dict[str, Any]
    tools: list[dict[str, Any]] | None
    where: str  # "file line 12", for error messages


def split_slice(path: str) -> tuple[Path, slice]:
    """`a.jsonl@[2:10]` -> (Path("a.jsonl"), slice(2, 10))."""
    found = _SLICE.match(path)
    if found is None:
        return Path(path), slice(None)
    start, stop = (int(found[part]) if found[part] else None for part in ("start", "stop"))
    return Path(found["path"]), slice(start, stop)


class PromptDataset:
    """The `Row`s of a prompt file. Raises ConfigError with file and line on a malformed row."""

    def __init__(self, path: str, keys: DataKeys) -> None:
        self.path, self.keys = path, keys
        file, wanted = split_slice(path)
        if not file.is_file():
            raise ConfigError(f"{file} does not exist. Correct the path.")
        if file.suffix == ".parquet":
            self._rows: JsonlRows | ParquetRows = ParquetRows(file, keys.all)
        elif file.suffix in (".jsonl", ".json"):
            self._rows = JsonlRows(file)
        else:
            raise ConfigError(
                f"{file} ends in neither .jsonl nor .parquet. Use one of these formats."
            )
        self._range = range(len(self._rows))[wanted]
        if not self._range:
            raise ConfigError(
                f"{path} holds no row ({len(self._rows)} in the file). "
                "Correct the slice or the file."
            )

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, i: int) -> Row:
        at = self._range[i]
        return self._to_row(self._rows[at], at)

    def where(self, i: int) -> str:
        """ "file line 12". Works for a row that cannot be read, too."""
        return self._rows.where(self._range[i])

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def _to_row(self, row: dict[str, Any], at: int) -> Row:
        keys, where = self.keys, self._rows.where(at)
        for key in keys.required:
            if key not in row:
                have = getattr(self._rows, "columns", None) or list(row)
                flag = "--input-key" if key == keys.input else "--label-key"
                raise ConfigError(
                    f"{where} has no key {key!r} ({flag}); its keys are: {', '.join(have)}. "
                    f"Give one of these keys to {flag}, or correct the file."
                )
        prompt = row[keys.input]
        if not _is_prompt(prompt):
            raise ConfigError(
                f"{where}: {keys.input!r} must be a non-empty string or a list of messages, each "
                f"with a role, not {shorten(prompt)}."
            )
        label = None
        if keys.label:
            label = row[keys.label]
            if isinstance(label, (int, float)) and not isinstance(label, bool):
                label = self._rows.spelt(at, keys.label)
        tools = _decoded(row.get(keys.tools)) if keys.tools else None
        return Row(
            prompt=prompt,
            label=label if label is None or isinstance(label, str) else _to_text(label),
            metadata=self._metadata(row, where),
            tools=tools or None,
            where=where,
        )

    def _metadata(self, row: dict[str, Any], where: str) -> dict[str, Any]:
        metadata = _decoded(row.get(self.keys.metadata)) if self.keys.metadata else None
        if metadata is None:
            return {}
        if not isinstance(metadata, dict):
            raise ConfigError(
                f"{where}: {self.keys.metadata!r} must be an object, not {shorten(metadata)} "
                "(--metadata-key names another field)."
            )
        return metadata


def check_prompt_data(
    path: str,
    *,
    input_key: str = "input",
    label_key: str | None = None,
    metadata_key: str | None = "metadata",
    tool_key: str | None = "tools",
    apply_chat_template: bool = True,
    row_problem: Callable[[Row], str | None] | None = None,
    flag: str = "--prompt-data",
    max_problems: int = 5,
) -> list[str]:
    """The problems of a prompt file, in the user's words.

    Reads every row of a file of up to a million rows. Of a longer file it reads at most a million
    rows, evenly spread; the others get the same checks when they are drawn. Rows with the same
    problem count as one problem. `apply_chat_template=False` refuses messages, and `row_problem`
    says why a row cannot be graded.
    """
    keys = DataKeys(input=input_key, label=label_key, metadata=metadata_key, tools=tool_key)
    try:
        data = PromptDataset(path, keys)
    except ConfigError as error:
        return [f"{flag} {error}"]
    except OSError as error:
        return [f"{flag} {path} cannot be read ({error.strerror}). Correct the path."]
    except Exception as error:  # pyarrow has its own errors for a broken Parquet file
        return [f"{flag} {path} could not be read: {error}"]
    first: dict[str, str] = {}  # problem -> the first row that has it
    rows: Counter[str] = Counter()
    for i in range(0, len(data), -(-len(data) // _ROWS_CHECKED_IN_FULL)):
        try:
            row = data[i]
            if not apply_chat_template and not isinstance(row.prompt, str):
                raise ConfigError(
                    f"{row.where}: {input_key!r} holds messages, which need --apply-chat-template. "
                    "Add this flag, or name another field with --input-key."
                )
            if row_problem is not None and (problem := row_problem(row)):
                raise ConfigError(f"{row.where}: {problem}.")
        except ConfigError as error:
            where = data.where(i)
            what = str(error).removeprefix(where)
            first.setdefault(what, where)
            rows[what] += 1
            if len(first) == max_problems:
                break
    shared = {what: f" ({n:,} rows have this problem.)" for what, n in rows.items() if n > 1}
    return [f"{flag} {where}{what}{shared.get(what, '')}" for what, where in first.items()]


def _is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return bool(prompt)
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(message, dict) and "role" in message for message in prompt)
    )


def _decoded(value: Any) -> Any:
    """Parquet files often hold nested values as JSON text."""
    if isinstance(value, str):
        try:
            return parse_json(value)
        except ValueError:
            return value
    return value


def _to_text(label: Any) -> str:
    return json.dumps(label, ensure_ascii=False) if isinstance(label, (dict, list)) else str(label)

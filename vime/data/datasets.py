"""Prompt files in JSONL and Parquet, read row by row and never held as Python objects.

A path may end in a slice as in Python: `prompts.jsonl@[100:200]`. A JSONL file is mapped into
memory and indexed with 8 bytes a line. Of a Parquet file only the needed columns are held, in
Arrow's format.
"""

from __future__ import annotations

import json
import mmap
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vime.errors import ConfigError

try:
    from orjson import loads as _fast_loads
except ImportError:
    _fast_loads = json.loads

_SLICE = re.compile(r"^(?P<path>.+)@\[(?P<start>-?\d*):(?P<stop>-?\d*)\]$")
_WHITE_SPACE = np.frombuffer(b" \t\r\n", np.uint8)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SCAN_BYTES = 64 << 20
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


class JsonlRows:
    """The lines of a JSONL file as dicts, parsed on access. Blank lines are skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        self._size = path.stat().st_size
        self._map = (
            mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) if self._size else b""
        )
        starts, ends, indented = self._scan()
        if self._map[:3] == _BYTE_ORDER_MARK:
            starts[0] = len(_BYTE_ORDER_MARK)
        blank = [i for i in indented if not self._map[starts[i] : ends[i]].strip()]
        self._line_ids = None
        if blank:
            self._line_ids = np.delete(np.arange(len(starts)), blank)
            starts, ends = starts[self._line_ids], ends[self._line_ids]
        self._starts = starts

    def _scan(self) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """(start of each line, its end, the lines that begin with white space), in one pass."""
        newlines: list[np.ndarray] = []
        indented: list[int] = []
        num_lines, begins_line = 0, True
        for at in range(0, self._size, _SCAN_BYTES):
            count = min(_SCAN_BYTES, self._size - at)
            part = np.frombuffer(self._map, np.uint8, count=count, offset=at)
            found = np.flatnonzero(part == 10)
            firsts = found[found + 1 < count] + 1
            if begins_line:
                firsts = np.concatenate([[0], firsts])
            white = np.flatnonzero(np.isin(part[firsts], _WHITE_SPACE))
            indented += (white + num_lines).tolist()
            num_lines += len(firsts)
            begins_line = bool(part[-1] == 10)
            newlines.append(found + at)
            _drop_pages(self._map, at, count)
        ends = np.concatenate(newlines) if newlines else np.empty(0, np.int64)
        if self._size and (not len(ends) or ends[-1] != self._size - 1):
            ends = np.append(ends, self._size)
        starts = np.empty_like(ends)
        if len(ends):
            starts[0], starts[1:] = 0, ends[:-1] + 1
        return starts, ends, indented

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, i: int) -> str:
        line = i if self._line_ids is None else int(self._line_ids[i])
        return f"{self.path} line {line + 1}"

    def _line(self, i: int) -> bytes:
        start = int(self._starts[i])
        end = self._map.find(b"\n", start)
        return self._map[start : end if end >= 0 else self._size]

    def spelt(self, i: int, key: str) -> Any:
        """The value of one field, with numbers as the text that stands in the file."""
        return json.loads(self._line(i), parse_float=str, parse_int=str)[key]

    def __getitem__(self, i: int) -> dict[str, Any]:
        text = self._line(i)
        try:
            row = _loads(text)
        except ValueError as error:
            raise ConfigError(
                f"{self.where(i)} is not valid JSON ({error}): {_shorten(text)}. Each line must be "
                "one JSON object; correct or delete the line."
            ) from None
        if not isinstance(row, dict):
            raise ConfigError(
                f"{self.where(i)} holds a JSON {type(row).__name__}, not an object: "
                f"{_shorten(text)}. Each line must be one JSON object."
            )
        return row


def _drop_pages(mapped: Any, at: int, count: int) -> None:
    """Lets the pages go that were seen, so that a scan does not hold the file in memory."""
    if isinstance(mapped, mmap.mmap):  # an empty file has no mapping
        mapped.madvise(mmap.MADV_DONTNEED, at, count)


class ParquetRows:
    """The rows of a Parquet file as dicts. Only `columns` are read."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        import pyarrow.parquet as parquet

        self.path = path
        names = parquet.read_schema(path).names
        self.columns = names
        self._table = parquet.read_table(
            path, columns=[name for name in names if name in columns], memory_map=True
        )

    def spelt(self, i: int, key: str) -> Any:
        """The value of one field; a Parquet number has one spelling."""
        return str(self[i][key])

    def __len__(self) -> int:
        return self._table.num_rows

    def where(self, i: int) -> str:
        return f"{self.path} row {i + 1}"

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self._table.slice(i, 1).to_pylist(maps_as_pydicts="lossy")[0]
        if not row:
            return {name: None for name in self.columns}
        return {name: _without_filling(value) for name, value in row.items()}


class PromptDataset:
    """The `Row`s of a prompt file. Raises ConfigError with file and line on a malformed one."""

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
                f"{file} ends in neither .jsonl nor .parquet. Write it in one of these formats."
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
        """ "file line 12", also for a row that cannot be read."""
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
                    f"Give {flag} one of these, or correct the file."
                )
        prompt = row[keys.input]
        if not _is_prompt(prompt):
            raise ConfigError(
                f"{where}: {keys.input!r} must be a non-empty string or a list of messages, each "
                f"with a role, not {_shorten(prompt)}."
            )
        label = row[keys.label] if keys.label else None
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
                f"{where}: {self.keys.metadata!r} must be an object, not {_shorten(metadata)} "
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
    flag: str = "--prompt-data",
    max_problems: int = 5,
) -> list[str]:
    """The problems of a prompt file, in the user's words.

    Reads every row of a file of up to a million rows. Of a longer file it reads at most a million
    rows, evenly spread; the others get the same checks when they are drawn. Rows with the same
    problem count as one problem. `apply_chat_template=False` refuses messages.
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
        except ConfigError as error:
            where = data.where(i)
            what = str(error).removeprefix(where)
            first.setdefault(what, where)
            rows[what] += 1
            if len(first) == max_problems:
                break
    return [
        f"{flag} {where}{what}"
        + (f" ({rows[what]:,} rows have this problem.)" if rows[what] > 1 else "")
        for what, where in first.items()
    ]


def _shared_by(num_rows: int) -> str:
    return f" ({num_rows:,} rows have this problem.)" if num_rows > 1 else ""


def _is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return bool(prompt)
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(message, dict) and "role" in message for message in prompt)
    )


def _loads(text: bytes | str) -> Any:
    """Like json.loads, which also takes NaN; ten times faster for the usual line."""
    try:
        return _fast_loads(text)
    except ValueError:
        return json.loads(text)


def _without_filling(value: Any) -> Any:
    """The value without the keys that Parquet fills in.

    Parquet gives every struct of a column all the keys of that column, and None where a row lacks
    one. A message's empty content stays.
    """
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if v is not None or k == "content"}
        return {k: _without_filling(v) for k, v in kept.items()}
    if isinstance(value, list):
        return [_without_filling(v) for v in value]
    return value


def _decoded(value: Any) -> Any:
    """Parquet files often hold nested values as JSON text."""
    if isinstance(value, str):
        try:
            return _loads(value)
        except ValueError:
            return value
    return value


def _to_text(label: Any) -> str:
    return json.dumps(label, ensure_ascii=False) if isinstance(label, (dict, list)) else str(label)


def _shorten(value: Any, limit: int = 80) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."

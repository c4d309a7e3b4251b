"""The rows of a JSONL or Parquet file, read on access and never held as Python objects.

A JSONL file is mapped into memory and indexed with 8 bytes per line. For a Parquet file, only the
needed columns are in memory, in Arrow's format.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vime.errors import ConfigError

try:
    from orjson import loads as _fast_loads
except ImportError:
    _fast_loads = json.loads

_WHITE_SPACE = np.frombuffer(b" \t\r\n", np.uint8)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SCAN_BYTES = 64 << 20


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
        """(starts of lines, ends of lines, lines that begin with white space), in one pass."""
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
        """The value of a field, with numbers as the text in the file."""
        return json.loads(self._line(i), parse_float=str, parse_int=str)[key]

    def __getitem__(self, i: int) -> dict[str, Any]:
        text = self._line(i)
        try:
            row = parse_json(text)
        except ValueError as error:
            raise ConfigError(
                f"{self.where(i)} is not valid JSON ({error}): {shorten(text)}. Each line must be "
                "one JSON object; correct or delete the line."
            ) from None
        if not isinstance(row, dict):
            raise ConfigError(
                f"{self.where(i)} holds a JSON {type(row).__name__}, not an object: "
                f"{shorten(text)}. Each line must be one JSON object."
            )
        return row


def _drop_pages(mapped: Any, at: int, count: int) -> None:
    """Frees the pages that a scan has read, so that it does not keep the file in memory."""
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
        """The value of a field as text. A number in Parquet has only one spelling."""
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


def parse_json(text: bytes | str) -> Any:
    """Like json.loads, but ten times faster unless the text needs its extensions, such as NaN."""
    try:
        return _fast_loads(text)
    except ValueError:
        return json.loads(text)


def _without_filling(value: Any) -> Any:
    """The value without the keys that Parquet adds.

    Parquet gives every struct of a column all keys of the column, with None for a missing key. The
    content of a message stays, even if it is None.
    """
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if v is not None or k == "content"}
        return {k: _without_filling(v) for k, v in kept.items()}
    if isinstance(value, list):
        return [_without_filling(v) for v in value]
    return value


def shorten(value: Any, limit: int = 80) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."

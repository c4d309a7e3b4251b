import json
import math
import tracemalloc

import pytest

from vime.data.datasets import DataKeys, PromptDataset, check_prompt_data
from vime.errors import ConfigError

KEYS = DataKeys(input="prompt", label="label")


def write(path, *lines):
    path.write_text("\n".join(lines))
    return str(path)


def row(i, **more):
    return json.dumps({"prompt": f"q{i}", "label": i, **more})


def test_rows_come_in_the_files_order_with_label_as_text_and_metadata(tmp_path):
    path = write(tmp_path / "a.jsonl", row(0, metadata={"rm_type": "math"}), "", row(1), "  ", "")
    rows = list(PromptDataset(path, KEYS))
    assert [(r.prompt, r.label) for r in rows] == [("q0", "0"), ("q1", "1")]
    assert rows[0].metadata == {"rm_type": "math"}
    assert rows[1].where.endswith("line 3")


@pytest.mark.parametrize(
    ("piece", "wanted"), [("[2:4]", [2, 3]), ("[:2]", [0, 1]), ("[-1:]", [5]), ("[4:99]", [4, 5])]
)
def test_a_slice_has_pythons_meaning(tmp_path, piece, wanted):
    path = write(tmp_path / "a.jsonl", *[row(i) for i in range(6)])
    assert [r.label for r in PromptDataset(f"{path}@{piece}", KEYS)] == [str(i) for i in wanted]


def test_a_byte_order_mark_blank_lines_and_nan_are_read(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    lines = [row(0), " " * 40, '{"prompt": "q1", "label": 1, "metadata": {"x": NaN}}', "\t", row(2)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    for scan_bytes in (1 << 20, *range(7, 60)):  # the file is read in pieces
        monkeypatch.setattr("vime.data.row_files._SCAN_BYTES", scan_bytes)
        monkeypatch.setattr("vime.data.row_files._drop_pages", lambda *_: None)
        rows = list(PromptDataset(str(path), KEYS))
        assert [(r.prompt, r.label) for r in rows] == [("q0", "0"), ("q1", "1"), ("q2", "2")]
        assert math.isnan(rows[1].metadata["x"])
        assert [r.where.rpartition(" ")[2] for r in rows] == ["1", "3", "5"]


@pytest.mark.parametrize(
    "number", ["18446744073709551617", "-9223372036854775809", "0.00001", "1e-5", "3.140", "7"]
)
def test_a_number_as_label_keeps_the_files_spelling(tmp_path, number):
    path = write(tmp_path / "a.jsonl", f'{{"prompt": "q", "label": {number}}}')
    assert PromptDataset(path, KEYS)[0].label == number


def test_parquet_gives_messages_and_tools_as_they_were_written(tmp_path):
    import pyarrow
    import pyarrow.parquet

    def tool(name, argument):
        properties = {argument: {"type": "string"}}
        parameters = {"type": "object", "properties": properties}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    ask = {"role": "user", "content": "q"}
    call = {"type": "function", "function": {"name": "a", "arguments": {"x": "1"}}}
    called = [ask, {"role": "assistant", "content": None, "tool_calls": [call]}]
    rows = [
        {"prompt": called, "label": "1", "tools": [tool("a", "x")]},
        {"prompt": [ask], "label": "2", "tools": [tool("b", "y")]},
    ]
    table = pyarrow.Table.from_pylist(rows)
    counts = pyarrow.array([{"a": 1}, None], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    pyarrow.parquet.write_table(table.append_column("metadata", counts), tmp_path / "a.parquet")
    found = list(PromptDataset(f"{tmp_path}/a.parquet", KEYS))
    assert [(r.prompt, r.tools) for r in found] == [(r["prompt"], r["tools"]) for r in rows]
    assert [r.metadata for r in found] == [{"a": 1}, {}]


def test_parquet_gives_the_same_rows_as_jsonl(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"prompt": [{"role": "user", "content": f"q{i}"}], "label": str(i), "metadata": {"i": i}}
        for i in range(5)
    ]
    lines = write(tmp_path / "a.jsonl", *map(json.dumps, rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    from_jsonl = list(PromptDataset(f"{lines}@[1:4]", KEYS))
    from_parquet = list(PromptDataset(f"{tmp_path}/a.parquet@[1:4]", KEYS))
    same = ("prompt", "label", "metadata")
    assert [[getattr(r, k) for k in same] for r in from_jsonl] == [
        [getattr(r, k) for k in same] for r in from_parquet
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "x", ', ["line 2", "not valid JSON"]),
        ("[1, 2]", ["line 2", "list"]),
        ('{"question": "x", "label": "1"}', ["line 2", "'prompt'", "--input-key", "question"]),
        ('{"prompt": "x", "answer": "1"}', ["line 2", "'label'", "--label-key", "answer"]),
        ('{"prompt": "", "label": "1"}', ["line 2", "non-empty"]),
        ('{"prompt": [{"content": "x"}], "label": "1"}', ["line 2", "role"]),
        ('{"prompt": "x", "label": "1", "metadata": [1]}', ["line 2", "metadata"]),
    ],
)
def test_a_malformed_line_is_reported_with_its_number_and_its_mistake(tmp_path, line, words):
    path = write(tmp_path / "a.jsonl", row(0), line, row(2))
    problems = check_prompt_data(path, input_key="prompt", label_key="label")
    assert len(problems) == 1
    assert problems[0].startswith(f"--prompt-data {path}")
    assert all(word in problems[0] for word in words), problems[0]
    with pytest.raises(ConfigError) as refused:
        PromptDataset(path, KEYS)[1]
    assert all(word in str(refused.value) for word in words), refused.value


def test_rows_with_the_same_problem_are_reported_once_with_their_number(tmp_path):
    path = write(tmp_path / "a.jsonl", row(0), *['{"text": "x"}'] * 1200, "{")
    missing, broken = check_prompt_data(path, input_key="prompt")
    assert missing == (
        f"--prompt-data {path} line 2 has no key 'prompt' (--input-key); its keys are: text. Give "
        "one of these keys to --input-key, or correct the file. (1,200 rows have this problem.)"
    )
    assert "line 1202 is not valid JSON" in broken


def test_a_missing_file_an_empty_slice_and_a_foreign_file_are_problems(tmp_path):
    path = write(tmp_path / "a.jsonl", row(0))
    (tmp_path / "b.parquet").write_text("no parquet")
    checks = {f"{tmp_path}/none.jsonl": "does not exist", f"{path}@[5:9]": "holds no row"}
    checks |= {f"{tmp_path}/b.parquet": "could not be read"}
    for name, words in checks.items():
        problems = check_prompt_data(name, input_key="prompt")
        assert len(problems) == 1
        assert words in problems[0]


def test_messages_without_the_chat_template_are_a_problem(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"prompt": [{"role": "user", "content": "x"}]}))
    assert check_prompt_data(path, input_key="prompt", apply_chat_template=True) == []
    (problem,) = check_prompt_data(path, input_key="prompt", apply_chat_template=False)
    assert "--apply-chat-template" in problem


def test_a_long_file_is_not_held_in_memory(tmp_path):
    path = tmp_path / "long.jsonl"
    line = row(1, filler="x" * 150) + "\n"
    path.write_text(line * 200_000)
    tracemalloc.start()
    data = PromptDataset(str(path), KEYS)
    assert (len(data), data[199_999].label) == (200_000, "1")
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < path.stat().st_size / 5


def test_parquet_has_slices_and_errors_with_row_numbers_too(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "p.parquet"
    rows = [{"prompt": f"q{i}" if i != 3 else "", "label": i} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    data = PromptDataset(f"{path}@[-2:]", DataKeys(input="prompt", label="label"))
    assert data[1].prompt == "q4"
    (problem,) = check_prompt_data(str(path), input_key="prompt", label_key="label")
    assert f"{path} row 4: 'prompt' must be a non-empty string" in problem
    problems = check_prompt_data(str(path), input_key="question", max_problems=1)
    assert "has no key 'question' (--input-key); its keys are: prompt, label" in problems[0]

"""The timeline of a run: what processes record, how it is placed, and the two files of it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.unit.fake_engine import FakeEngine, ids_of
from vime.observe import RunLog, Timers, spans
from vime.observe.timeline import from_first_step, main, write_if_short, write_timeline
from vime.observe.tracks import Span, between, by_track, in_progress, lanes, read_spans
from vime.rollout.client import GenerateClient
from vime.rollout.wire import Generation


@pytest.fixture(autouse=True)
def _stopped():
    yield
    spans.stop()


def work(began, ended, *, overlaps=True, track="engine 0", name="generate"):
    return Span(name, track, began, ended, overlaps)


def write_lines(folder, process, *lines):
    (folder / spans.FOLDER).mkdir(exist_ok=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps([line]) for line in lines)
    (folder / spans.FOLDER / f"{process}.jsonl").write_text(text)


def test_spans_nest_in_the_track_of_their_process(tmp_path):
    spans.record(tmp_path, "trainer-1")
    with spans.span("train", rollout=3), spans.span("log probs"):
        pass
    spans.stop()
    outer, inner = read_spans(tmp_path)
    assert (outer.name, inner.name, outer.args) == ("train", "log probs", {"rollout": 3})
    assert outer.track == inner.track == "trainer 1"
    assert outer.began <= inner.began <= inner.ended <= outer.ended
    assert lanes([outer, inner]) == [0, 0]


def test_a_block_that_raises_an_error_is_recorded(tmp_path):
    spans.record(tmp_path, "manager")
    with pytest.raises(RuntimeError), spans.span("save"):
        raise RuntimeError
    spans.stop()
    assert [span.name for span in read_spans(tmp_path)] == ["save"]


def test_timers_record_their_blocks(tmp_path):
    spans.record(tmp_path, "loop")
    with Timers()("wake_up"):
        pass
    spans.stop()
    assert [span.name for span in read_spans(tmp_path)] == ["wake up"]


def test_nothing_is_recorded_without_the_flag(tmp_path):
    with RunLog(log_settings(tmp_path, timeline=False)) as log, log.phase("train"):
        spans.add("generate", spans.now(), "engine 0")
        assert not spans.recording()
    assert list(tmp_path.iterdir()) == []


def test_spans_reach_the_file_without_a_stop(tmp_path):
    """A process that is killed has no time for one."""
    code = (
        "import os, sys, time\n"
        "from vime.observe import spans\n"
        "spans.FLUSH_S = 0.01\n"
        "spans.record(sys.argv[1], 'manager')\n"
        "with spans.span('batching'): pass\n"
        "file = os.path.join(sys.argv[1], 'timeline', 'manager.jsonl')\n"
        "deadline = time.monotonic() + 30\n"
        "while not os.path.getsize(file) and time.monotonic() < deadline: time.sleep(0.01)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert ended.returncode == -9
    assert [span.name for span in read_spans(tmp_path)] == ["batching"]


def test_a_full_disk_ends_the_timeline_and_not_the_run(tmp_path, caplog):
    spans.record(tmp_path, "manager")
    spans._recorder._file.close()
    spans._recorder._file = SimpleNamespace(closed=False, write=refuse, close=lambda: None)
    with spans.span("batching"):
        pass
    spans.flush()
    assert "the timeline ends here" in caplog.text


def refuse(text):
    raise OSError(28, "No space left on device")


def test_half_a_line_at_the_end_is_ignored_and_elsewhere_is_an_error(tmp_path):
    whole = {"name": "train", "ts": 5, "dur": 2}
    write_lines(tmp_path, "trainer-0", whole, '[{"name": "tra')
    assert read_spans(tmp_path) == [Span("train", "trainer 0", 5, 7)]
    write_lines(tmp_path, "trainer-0", '[{"name": "tra', whole)
    with pytest.raises(ValueError, match=r"trainer-0.jsonl:1"):
        read_spans(tmp_path)


def test_a_run_without_spans_names_the_flag(tmp_path):
    with pytest.raises(ValueError, match="--timeline"):
        read_spans(tmp_path)


def test_overlapping_work_gets_the_lowest_free_lane():
    requests = [work(0, 10), work(0, 4), work(2, 6), work(4, 9), work(10, 12)]
    assert lanes(requests) == [0, 1, 2, 1, 0]


def test_work_within_other_work_is_not_drawn_inside_it_if_it_only_overlaps():
    assert lanes([work(0, 10), work(2, 4)]) == [0, 1]


def test_threads_of_a_process_get_further_lanes_only_where_their_work_crosses():
    own = [work(*ends, overlaps=False) for ends in ((0, 10), (1, 3), (3, 12), (4, 6), (12, 13))]
    assert lanes(own) == [0, 0, 1, 0, 0]


def test_no_lane_holds_two_requests_at_once():
    requests = [work(i, i + 7 * (i % 5) + 1) for i in range(200)]
    placed = {}
    for request, lane in zip(requests, lanes(requests), strict=True):
        assert placed.get(lane, 0) <= request.began
        placed[lane] = request.ended


def test_the_number_in_progress_changes_where_work_begins_and_ends():
    assert in_progress([work(0, 4), work(2, 4), work(4, 5)]) == [(0, 1), (2, 2), (4, 1), (5, 0)]


def test_tracks_are_in_the_order_of_the_picture():
    names = ["groups", "engine 10", "engine 2", "trainer 0", "my own", "loop", "manager"]
    ordered = by_track(work(0, 1, track=name) for name in names)
    assert list(ordered) == [
        "loop", "manager", "trainer 0", "engine 2", "engine 10", "groups", "my own",
    ]  # fmt: skip


def test_a_part_of_a_run_cuts_the_spans_at_its_ends():
    run = [work(1_000_000, 4_000_000), work(5_000_000, 6_000_000)]
    assert between(run, 1, 2) == [work(2_000_000, 3_000_000)]


def test_the_files_of_all_processes_become_one_trace_and_one_picture(tmp_path):
    pytest.importorskip("matplotlib")
    step = {"name": "step", "ts": 0, "dur": 9_000_000, "args": {"step": 0}}
    write_lines(tmp_path, "loop", step, {"name": "train wait", "ts": 0, "dur": 5_000_000})
    requests = [
        {"name": name, "ts": ts, "dur": 2_000_000, "track": "engine 0"}
        for name, ts in (("generate", 0), ("generate", 1_000_000), ("evaluate", 1_500_000))
    ]
    update = {"name": "update weights", "ts": 8_000_000, "dur": 500_000, "track": "engine 0"}
    write_lines(tmp_path, "manager", *requests, update, {"name": "mine", "ts": 1, "dur": 1})
    trace, picture = write_timeline(tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    events = json.loads(trace.read_text())["traceEvents"]
    named = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert list(named.values()) == ["loop", "manager", "engine 0"]
    engine = [e for e in events if named[e["pid"]] == "engine 0"]
    assert [(e["ts"], e["tid"]) for e in engine if e["ph"] == "X"] == [
        (0, 0), (1_000_000, 1), (1_500_000, 2), (8_000_000, 0),
    ]  # fmt: skip
    assert max(e["args"]["number"] for e in engine if e["ph"] == "C") == 3


def test_the_picture_leaves_out_the_start_of_the_run(tmp_path):
    run = [work(0, 70, name="start"), work(60, 90), work(80, 99, name="step")]
    cut = from_first_step(run)
    assert [(s.name, s.began, s.ended) for s in cut] == [("generate", 80, 90), ("step", 80, 99)]
    assert from_first_step(run[:2]) == run[:2]


def test_the_command_draws_a_part_and_explains_itself(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_lines(tmp_path, "loop", {"name": "train", "ts": 0, "dur": 9_000_000})
    assert main([str(tmp_path), "1", "2.5"]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "timeline.json"), str(tmp_path / "timeline.png"),
    ]  # fmt: skip
    assert main([str(tmp_path), "20", "30"]) == 1
    assert main([]) == 2
    assert main([str(tmp_path / "elsewhere")]) == 1
    assert "--timeline" in capsys.readouterr().err


def log_settings(folder, **given):
    fields = dict.fromkeys(("tb_dir", "wandb_project", "wandb_group"))
    off = {"use_tensorboard": False, "use_wandb": False, "progress": "none"}
    return SimpleNamespace(**{**fields, **off, "run_dir": str(folder), **given})


def test_a_run_writes_its_timeline_at_its_end_and_drops_that_of_an_earlier_run(tmp_path):
    pytest.importorskip("matplotlib")
    write_lines(tmp_path, "trainer-7", {"name": "train", "ts": 0, "dur": 1})
    with RunLog(log_settings(tmp_path, timeline=True)) as log, log.phase("train"):
        pass
    assert [(span.track, span.name) for span in read_spans(tmp_path)] == [("loop", "train")]
    assert (tmp_path / "timeline.json").is_file()
    assert (tmp_path / "timeline.png").is_file()
    assert not spans.recording()


def test_a_long_run_ends_without_the_files_and_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("vime.observe.timeline.MOST_BYTES", 10)
    write_lines(tmp_path, "loop", {"name": "train", "ts": 0, "dur": 1})
    assert f"python -m vime.observe.timeline {tmp_path} START END" in write_if_short(tmp_path)
    assert not (tmp_path / "timeline.json").exists()


async def test_spans_of_one_event_loop_overlap(tmp_path):
    spans.record(tmp_path, "manager")

    async def grade(sample):
        with spans.span("grade", "graders", sample=sample):
            await asyncio.sleep(0.01)

    await asyncio.gather(*map(grade, range(3)))
    spans.stop()
    assert sorted(lanes(read_spans(tmp_path))) == [0, 1, 2]


def test_a_request_belongs_to_the_engine_that_answered(tmp_path):
    urls = ("http://h:1", "http://h:2")
    client = GenerateClient("http://h:9", urls, concurrency=1, timeout_s=1, purpose="evaluate")
    spans.record(tmp_path, "manager")
    for engine in ("http://h:2", None):
        client._record(spans.now(), "3-17", Generation([5, 6], [0, 0], [2, 3], engine=engine))
    spans.stop()
    first, second = read_spans(tmp_path)
    assert (first.name, first.track, second.track) == ("evaluate", "engine 1", "engines")
    assert first.args == {"sample": "3-17", "tokens": 2, "versions": [2, 3]}


async def test_answers_of_other_engines_are_recorded_too(tmp_path):
    answer = lambda prompt, params: (ids_of("ok"), 0.01)  # noqa: E731
    with FakeEngine(answer) as engine:
        spans.record(tmp_path, "manager")
        async with GenerateClient(engine.url, (engine.url,), concurrency=1, timeout_s=9) as client:
            params = {"max_tokens": 5}
            await asyncio.gather(*(client.generate([4], params) for _ in range(2)))
        spans.stop()
    first, second = read_spans(tmp_path)
    assert first.track == "engines"
    assert first.ended <= second.began  # a request that waits for a slot has not begun

"""Metrics survive crashes and resumes; progress, plots and trackers show them."""

import io
import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vime.errors import ConfigError
from vime.observe import MetricsLog, Progress, RunLog, Timers, make_trackers, read_metrics
from vime.observe.plot import learning_curves, plot_learning
from vime.observe.progress import clock_time, result
from vime.observe.reading import eval_scores, phase_seconds
from vime.observe.trackers import missing_packages

VIME = Path(__file__).parents[2] / "vime"
METRIC = re.compile(r'"((?:rollout|train|perf|eval)/[^" {]+)"')
READ = re.compile(r'\w\["[^"]+"\](?!\s*[+|]?=[^=])')  # metrics["perf/x"], not assigned to


def test_no_metric_has_two_authors():
    """The second would silently replace the first. `observe/reading.py` reads, it writes none."""
    authors = defaultdict(set)
    for path in VIME.rglob("*.py"):
        if path != VIME / "observe/reading.py":
            for name in METRIC.findall(READ.sub("", path.read_text())):
                authors[name].add(path.relative_to(VIME).as_posix())
    assert len(authors) > 60
    assert {name: files for name, files in authors.items() if len(files) > 1} == {}


def log_steps(folder, steps, start_step=0, **metrics):
    with MetricsLog(folder, start_step=start_step) as log:
        for step in steps:
            log.log(step, {"rollout/raw_reward": step / 10, **metrics})


def steps_in(folder):
    return [r["step"] for r in read_metrics(folder)]


def test_each_step_is_one_line_and_is_written_before_the_run_ends(tmp_path):
    log = MetricsLog(tmp_path)
    log.log(0, {"eval/addition": 0.3})
    log.log(1, {"rollout/raw_reward": np.float32(0.5), "train/loss": torch.tensor(2)})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]
    assert json.loads(lines[1])["rollout/raw_reward"] == 0.5
    assert json.loads(lines[1])["train/loss"] == 2


def test_a_non_finite_value_is_null_and_listed(tmp_path):
    record = MetricsLog(tmp_path).log(1, {"train/loss": math.nan, "train/grad_norm": math.inf})
    assert record["train/loss"] is None
    assert record["non_finite"] == {"train/loss": "nan", "train/grad_norm": "inf"}
    text = (tmp_path / "metrics.jsonl").read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_a_resumed_run_drops_the_steps_after_its_checkpoint(tmp_path):
    log_steps(tmp_path, range(0, 26), source=0)
    log_steps(tmp_path, range(21, 31), start_step=20, source=1)
    assert steps_in(tmp_path) == list(range(31))
    assert [r["source"] for r in read_metrics(tmp_path)] == [0] * 21 + [1] * 10


def test_a_step_that_a_resume_logs_again_keeps_its_line_and_its_first_values(tmp_path):
    log_steps(tmp_path, range(0, 21), source=0)
    with MetricsLog(tmp_path, start_step=20) as log:
        log.log(20, {"source": 1, "eval/addition": 0.9})
        log.log(21, {"source": 1})
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records] == list(range(22))
    assert records[20]["source"] == 0
    assert records[20]["eval/addition"] == 0.9


def test_a_resumed_run_that_logs_nothing_keeps_all_lines(tmp_path):
    log_steps(tmp_path, range(0, 21))
    MetricsLog(tmp_path, start_step=20).close()
    assert steps_in(tmp_path) == list(range(21))


def test_a_new_run_in_an_old_folder_starts_an_empty_file(tmp_path):
    log_steps(tmp_path, range(0, 5))
    log_steps(tmp_path, range(0, 2))
    assert steps_in(tmp_path) == [0, 1]


def test_a_run_killed_between_the_commit_of_a_step_and_its_line_keeps_the_line(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.log(1, {"train/loss": 0.5})
        log.keep(2, {"train/loss": 0.25})  # then the checkpoint is committed, and the run is killed
    with MetricsLog(tmp_path, start_step=2) as log:
        log.log(3, {"train/loss": 0.125})
    assert [(m["step"], m["train/loss"]) for m in read_metrics(tmp_path)] == [
        (1, 0.5),
        (2, 0.25),
        (3, 0.125),
    ]
    with MetricsLog(tmp_path, start_step=1) as log:  # an older checkpoint: step 2 is done again
        log.log(2, {"train/loss": 0.75})
    assert [m["train/loss"] for m in read_metrics(tmp_path)] == [0.5, 0.75]


def test_a_line_cut_short_by_a_crash_does_not_stop_a_resume(tmp_path):
    log_steps(tmp_path, range(0, 4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rollout/raw_re')
    log_steps(tmp_path, [4], start_step=3)
    assert steps_in(tmp_path) == [0, 1, 2, 3, 4]


def test_a_damaged_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step\n{"step": 2}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:2"):
        read_metrics(tmp_path)


def test_a_step_cannot_be_logged_twice(tmp_path):
    log = MetricsLog(tmp_path)
    log.log(1, {})
    with pytest.raises(ValueError, match="step 1 logged after step 1"):
        log.log(1, {})


def test_trackers_get_only_finite_numbers(tmp_path):
    seen = []
    tracker = SimpleNamespace(log=lambda step, n: seen.append((step, n)), close=lambda: None)
    with MetricsLog(tmp_path, trackers=[tracker]) as log:
        log.log(3, {"train/loss": 1.5, "train/lr": math.nan, "note": "text"})
    assert seen == [(3, {"train/loss": 1.5})]


def test_tensorboard_files_hold_the_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = make_trackers(tmp_path, use_tensorboard=True)
    with MetricsLog(tmp_path, trackers=trackers) as log:
        log.log(7, {"train/loss": 1.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(7, 1.5)]


def test_a_wandb_run_records_the_flags_and_has_its_own_step_axis(monkeypatch, tmp_path):
    """A stand-in for the package records its calls."""
    said = []

    class Run:
        def __getattr__(self, name):
            return lambda *a, **k: said.append((name, *a, *k.values()))

    def init(**kwargs):
        said.append(kwargs)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=object()))
    trackers = make_trackers(tmp_path, use_wandb=True, wandb_group="g", config={"lr": 1e-6})
    with MetricsLog(tmp_path, trackers=trackers) as log:
        log.log(7, {"train/loss": 1.5})
    assert said == [
        {"project": "vime", "group": "g", "dir": str(tmp_path), "config": {"lr": 1e-6}},
        ("define_metric", "step"),
        ("define_metric", "*", "step"),
        ("log", {"step": 7, "train/loss": 1.5}),
        ("finish",),
    ]


def test_a_tracker_whose_package_is_missing_names_the_flag(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert len(missing_packages(use_tensorboard=True, use_wandb=True)) == 2
    with pytest.raises(ConfigError, match="--use-wandb"):
        make_trackers(tmp_path, use_wandb=True)


def test_timers_add_up_and_restart_after_they_are_taken():
    clock = iter([0.0, 1.0, 5.0, 7.0, 8.0, 8.5])
    timers = Timers(clock=lambda: next(clock))
    with timers("rollout"):
        pass
    with pytest.raises(RuntimeError, match="of the rollout"), timers("rollout"):
        raise RuntimeError("of the rollout")
    assert timers.take() == {"perf/rollout_time": 3.0}
    with timers("actor_train"):
        pass
    assert timers.take() == {"perf/actor_train_time": 0.5}


def test_eval_scores_are_distinguished_from_their_details():
    record = {
        "eval/add-3": 0.5, "eval/add-3-truncated_ratio": 0.1, "eval/add-3-pass@4": 0.9,
        "eval/step": 5, "rollout/raw_reward": 0.4,
    }  # fmt: skip
    assert eval_scores(record) == {"add-3": 0.5}


def test_phases_sum_their_metrics():
    record = {"perf/log_probs_time": 1.0, "perf/ref_log_probs_time": 2.0, "perf/rollout_time": None}
    assert phase_seconds(record) == {"log-probs": 3.0}


def test_plain_progress_prints_a_line_with_reward_score_and_time_left():
    now = [0.0]
    stream = io.StringIO()
    with Progress(4, mode="auto", stream=stream, clock=lambda: now[0]) as progress:
        progress.update(0, {"eval/addition": 0.3})
        for step in (1, 2):
            now[0] += 10
            progress.update(step, {"rollout/raw_reward": 0.25, "perf/rollout_time": 7.0})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert "eval addition 0.300" in lines[0]
    assert lines[2] == "rollout 2/4  reward 0.250  left 0:20  rollout 7.0s"


def test_plain_progress_skips_lines_that_come_too_fast_except_the_last():
    now = [0.0]
    stream = io.StringIO()
    with Progress(400, mode="plain", stream=stream, clock=lambda: now[0]) as progress:
        for step in range(1, 401):
            now[0] += 0.1
            progress.update(step, {"train/loss": 1.0})
    lines = stream.getvalue().splitlines()
    assert 30 <= len(lines) <= 50
    assert lines[-1].startswith("rollout 400/400  loss 1.000")


def test_live_progress_shows_the_step_and_stops():
    stream = io.StringIO()
    with Progress(2, mode="rich", stream=stream) as progress:
        progress.phase("rollout")
        progress.update(1, {"rollout/raw_reward": 0.5})
    assert "1/2" in stream.getvalue()


def test_live_progress_keeps_the_main_figures_on_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    stream = io.StringIO()
    with Progress(60, mode="rich", stream=stream) as progress:
        progress.update(0, {"eval/addition": 0.33})
        progress.update(12, {"rollout/raw_reward": 0.612, "perf/rollout_time": 2.1})
        progress.phase("sync weights")
    shown = stream.getvalue()
    for words in ("rollout 12/60", "reward 0.612", "addition 0.330", "left ", "rollout 2.1s"):
        assert words in shown


def test_progress_of_mode_none_prints_nothing():
    stream = io.StringIO()
    with Progress(2, mode="none", stream=stream) as progress:
        progress.update(1, {"rollout/raw_reward": 0.5})
    assert stream.getvalue() == ""


def test_progress_shows_the_loss_if_there_is_no_reward():
    assert result({"train/loss": 0.5}) == "loss 0.500"
    assert result({"train/loss": 0.5, "rollout/raw_reward": 1.0}) == "reward 1.000"


def test_times_are_written_as_on_a_clock():
    assert [clock_time(s) for s in (8, 61, 3725)] == ["0:08", "1:01", "1:02:05"]


def test_a_reward_is_drawn_at_the_number_of_rollouts_that_trained_its_weights():
    records = [
        {"step": 0, "eval/addition": 0.3},
        {"step": 1, "rollout/raw_reward": 0.3},
        {"step": 2, "rollout/raw_reward": 0.4, "eval/addition": 0.5},
    ]
    rewards, evals = learning_curves(records)
    assert rewards == [(0, 0.3), (1, 0.4)]
    assert evals == {"addition": [(0, 0.3), (2, 0.5)]}


def test_the_plot_is_a_png_and_refuses_metrics_without_rewards(tmp_path):
    pytest.importorskip("matplotlib")
    records = [{"step": s, "rollout/raw_reward": s / 9, "eval/a": s / 9} for s in range(1, 9)]
    path = plot_learning(records, tmp_path / "a.png", title="t", reference=(0.4, "words"))
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_learning([{"step": 1, "train/loss": 1.0}], tmp_path / "b.png", title="t")


def settings(**given):
    fields = dict.fromkeys(("run_dir", "tb_dir", "wandb_project", "wandb_group"))
    off = {"use_tensorboard": False, "use_wandb": False, "progress": "none", "timeline": False}
    return SimpleNamespace(**{**fields, **off, **given})


def test_a_run_log_writes_to_run_dir_or_else_to_the_fallback(tmp_path):
    with RunLog(settings(), fallback_dir=str(tmp_path / "save")) as log:
        log.start(0, 2)
        with log.phase("train"):
            log.step(1, {"train/loss": 1.0})
    assert steps_in(tmp_path / "save") == [1]
    assert RunLog(settings(run_dir=str(tmp_path)), fallback_dir="elsewhere").run_dir == tmp_path


def test_a_run_log_that_never_started_keeps_old_metrics(tmp_path):
    log_steps(tmp_path, range(0, 3))
    with (
        RunLog(settings(run_dir=str(tmp_path))) as log,
        pytest.raises(RuntimeError, match="before RunLog.start"),
    ):
        log.step(1, {})
    assert steps_in(tmp_path) == [0, 1, 2]

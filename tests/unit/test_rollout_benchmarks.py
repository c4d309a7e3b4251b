"""The arithmetic of the rollout benchmarks, on invented measurements."""

from benchmarks import grading, rollout


def test_the_ratio_is_computed_for_each_run(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1")
    common = {"cpu": 0.5, "server_cpu_s": 4.0, "router_cpu_s": 1.0, "direct_cpu_s": 3.0}
    runs = [
        {"http": 90.0, "direct": 100.0, "client_share": 0.2, "client_cpu_us": 50.0},
        {"http": 50.0, "direct": 50.0, "client_share": 0.3, "client_cpu_us": 70.0},
        {"http": 95.0, "direct": 100.0, "client_share": 0.1, "client_cpu_us": 60.0},
    ]
    runs = [{**run, **common} for run in runs]
    figures = {f["name"].split("/")[1]: f for f in rollout.summarize(runs)}
    assert figures["http_ratio"]["value"] == 0.95
    assert figures["http_ratio"]["spread"] == [0.9, 1.0]
    assert figures["throughput"]["value"] == 90.0
    assert figures["throughput"]["peer"] == 100.0
    assert figures["client_cpu_share"]["value"] == 0.2
    needed = {"name", "value", "unit", "peer", "device", "versions", "spread"}
    assert all(needed <= set(figure) for figure in figures.values())
    assert figures["http_ratio"]["in_flight"] == 512


def test_grading_figures_name_the_peer(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1")
    runs = {
        "vime": [{"seconds": 2.0, "cpu_s": 1.0}, {"seconds": 4.0, "cpu_s": 1.0}],
        "one process": [{"seconds": 10.0, "cpu_s": 10.0}, {"seconds": 10.0, "cpu_s": 10.0}],
    }
    figures = {f["name"].split("/")[1]: f for f in grading.summarize(runs, 100, 2, 0)}
    assert (figures["rate"]["value"], figures["rate"]["peer"]) == (37.5, 10.0)
    assert figures["speedup"]["spread"] == [2.5, 5.0]
    assert (figures["cpu_per_answer"]["value"], figures["cpu_per_answer"]["peer"]) == (1e4, 1e5)


def test_the_answers_are_of_every_kind_and_most_of_them_are_right():
    answers = grading.make_answers(400)
    assert answers == grading.make_answers(400)
    boxes = sum("\\boxed" in response for response, _ in answers)
    assert 350 < boxes < 400
    quick = [grading.math.quick(response, label, {}) for response, label in answers]
    assert 0.1 < sum(reward is None for reward in quick) / 400 < 0.4  # these need algebra
    decided = [reward for reward in quick if reward is not None]
    assert 0.5 < sum(decided) / len(decided) < 0.8

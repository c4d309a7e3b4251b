"""The arithmetic of the rollout benchmarks, on invented measurements."""

import json

import pytest

from benchmarks import fake_engines, grading, rollout, rollout_scale
from vime.rollout import wire


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


def scale_run(num_samples, seconds):
    part = {"wall_s": 1.0, "peak_gib": num_samples / 1000, "kept_gib": 0.0}
    parts = {name: {"cpu_s": cpu_s, **part} for name, cpu_s in seconds.items()}
    return {"num_samples": num_samples, "num_tokens": num_samples * 8000, "parts": parts}


def test_each_part_of_a_large_rollout_is_compared_with_generation(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1")
    runs = [
        scale_run(4000, {"generate": 4.0, "batch": 3.2}),
        scale_run(1000, {"generate": 1.0, "batch": 0.2}),
        scale_run(2000, {"generate": 2.0, "batch": 0.8}),
    ]
    # 4,000 samples of 8,000 tokens, at 12,500 tokens/s on 256 engines: 10 s
    figures = {f["name"]: f for f in rollout_scale.summarize(runs, 12_500.0)}
    generate, batch = figures["rollout_scale/generate"], figures["rollout_scale/batch"]
    assert generate["value"] == 0.4
    assert generate["spread"] == [0.4, 0.4]
    assert generate["exponent"] == 1.0
    assert batch["exponent"] == 2.0
    assert batch["spread"] == [0.08, 0.32]
    assert (generate["breaks_first"], batch["breaks_first"]) == (True, False)
    assert generate["at_the_target_size"] == {
        "num_samples": 100_000, "cpu_s": 100.0, "peak_gib": 100.0
    }  # fmt: skip
    (alone,) = rollout_scale.summarize([scale_run(1000, {"put": 1.0})], 12_500.0)
    assert alone["exponent"] is None
    assert json.loads(rollout_scale.RATE.read_text())["tok_per_s"] == rollout_scale.measured_rate()


def test_a_fake_engine_answers_as_the_packed_route_does():
    pytest.importorskip("msgspec", reason="the packed route needs it")
    bodies = [b.split(b"\r\n\r\n", 1) for b in fake_engines.bodies(50, 151_936, seed=0)]
    answers = [wire.parse_response(body) for _, body in bodies]
    assert {len(a.token_ids) for a in answers} == {50}
    assert {len(a.text) for a in answers} == {200}
    assert len({a.text for a in answers}) == fake_engines.ANSWERS
    assert answers[0].weight_versions == [3] * 50
    head, body = bodies[0]
    assert f"content-length: {len(body)}".encode() in head

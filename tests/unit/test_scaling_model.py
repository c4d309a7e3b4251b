"""The scaling model's arithmetic, redone by hand, and the sources of its inputs."""

import argparse
import json

import pytest

from benchmarks.gpu_assets import PROMPT_TOKENS
from benchmarks.scaling_model import (
    LAYOUTS,
    QWEN3_4B,
    Known,
    as_cell,
    dp_bytes,
    figures,
    measured,
    step,
    tp_bytes,
)

ARGS = argparse.Namespace(mean=2048, longest=0, recompute=False, reference=False)


def known(folder, **values) -> dict[str, Known]:
    return figures(folder) | {k: Known(v, "given", True) for k, v in values.items()}


def layout(name: str):
    return next(x for x in LAYOUTS if x.name == name)


def test_bytes_of_sequence_and_data_parallelism():
    assert tp_bytes(QWEN3_4B, 2, 1000, recompute=False) == 10 * 36 * 2 * 2560 * 1000 / 2
    assert tp_bytes(QWEN3_4B, 1, 1000, recompute=True) == 0
    assert dp_bytes(QWEN3_4B, 2, 4) == pytest.approx(6 * QWEN3_4B.parameters / 2 * 3 / 4)


def test_without_communication_costs_and_stragglers_eight_gpus_are_eight_times_as_fast(tmp_path):
    free = {"nvlink_B_s": 1e30, "hbm_B_s": 1e30, "pcie_B_s": 1e30, "tp_engine": 1.0}
    free |= {"update_s": 0.0, "sleep_wake_s": 0.0}
    rates = known(tmp_path, train_tok_s=10_000.0, rollout_tok_s=10_000.0, **free)
    one, eight = (step(layout(name), rates, ARGS) for name in ("1, colocated", "8, colocated"))
    assert one["rollout"] == 256 * 2048 / 10_000
    assert one["train"] == 256 * (2048 + PROMPT_TOKENS) / 10_000
    assert eight["step"] == pytest.approx(one["step"] / 8)
    assert eight["idle share"] == pytest.approx(0)


def test_a_rollout_takes_at_least_as_long_as_its_longest_response(tmp_path):
    args = argparse.Namespace(**{**vars(ARGS), "longest": 100_000})
    slow = step(layout("8, colocated"), known(tmp_path, token_s=0.01), args)
    assert slow["rollout"] == 1000
    assert slow["idle share"] > 0.9


def test_a_measurement_replaces_an_assumption(tmp_path):
    assert "ASSUMED" in figures(tmp_path)["train_tok_s"].source
    record = {"tok_per_s": 15_000, "device": "NVIDIA H200"}
    (tmp_path / "train_mfu_4b.json").write_text(json.dumps(record))
    found = figures(tmp_path)["train_tok_s"]
    assert (found.value, found.measured) == (15_000, True)
    assert "NVIDIA H200" in found.source


def test_measurements_of_the_recipe_stand_below_the_prediction(tmp_path):
    took = {"step": 40.0, "rollout": 38.0, "log_probs": 4.0, "train": 16.0, "weight_update": 0.2}
    took |= {"sleep_wake": 0.0, "offload_onload": 0.0}
    run = {
        "tokens_per_s_per_gpu": 1800.0,
        "mean_response": 1000.0,
        "phases": {name: {"value": value} for name, value in took.items()},
    }
    (tmp_path / "founding_recipe_async_4_gpus.json").write_text(json.dumps(run))
    rates = known(tmp_path, rollout_tok_s=16_000.0, tp_engine=1.0)
    row = measured(layout("4, async 2 + 2"), rates, tmp_path)
    assert list(row) == list(step(layout("4, async 2 + 2"), rates, ARGS))
    assert row["idle share"] == pytest.approx(1 - (2 * 20 + 2 * 8) / (4 * 40))
    cells = [as_cell(*cell) for cell in row.items()]
    assert cells == ["38.00", "4.00", "16.00", "0.20", "0.00", "40.00", "1,800", "65%"]
    assert measured(layout("4, decoupled 2 + 2"), rates, tmp_path) == {}

"""The benchmark of estimators keeps the results of estimators that it does not train."""

import json
from pathlib import Path

import pytest

from benchmarks.estimators import spread_out, table_of, with_earlier


def entry(name: str, after: float) -> dict:
    return {"estimator": name, "curve": [[0, 0.25], [3, after]]}


def test_a_subset_keeps_the_other_results_in_the_order_of_the_choices(
    tmp_path: Path,
) -> None:
    output = tmp_path / "estimators.json"
    assert with_earlier(output, [entry("rloo", 0.5)]) == [entry("rloo", 0.5)]
    output.write_text(json.dumps([entry("rloo", 0.5), entry("grpo", 0.5)]))
    kept = with_earlier(output, [entry("rloo", 0.75)])
    assert kept == [entry("grpo", 0.5), entry("rloo", 0.75)]


def test_the_table_leaves_unmeasured_cells_blank() -> None:
    rows = {"grpo": [(0, 0.25), (3, 0.5)], "rloo": [(0, 0.25), (4, 0.5)]}
    assert table_of(rows).splitlines()[2:] == [
        "| `grpo` | 0.250 | 0.500 |  |",
        "| `rloo` | 0.250 |  | 0.500 |",
    ]


def test_labels_keep_their_distance_and_stay_near_the_ends_of_their_lines() -> None:
    assert spread_out([0.1, 0.5], 0.25) == pytest.approx([0.1, 0.5])
    assert spread_out([0.5, 0.5, 0.5], 0.25) == pytest.approx([0.25, 0.5, 0.75])

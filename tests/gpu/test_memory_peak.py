"""The plan's estimate of the peak is within 10% of the peak that a GPU counts."""

import pytest

from benchmarks.memory import DEFAULT, TARGET, in_own_process


@pytest.mark.parametrize("case", DEFAULT)
def test_the_estimated_peak_is_near_the_measured_peak(case):
    estimate, measured = in_own_process(case)["peak"]
    assert estimate == pytest.approx(measured, rel=TARGET)

"""The peak that the plan foretells is the one that a GPU counts, within 10%."""

import pytest

from benchmarks.memory import DEFAULT, TARGET, in_own_process


@pytest.mark.parametrize("case", DEFAULT)
def test_the_peak_is_the_one_foretold(case):
    estimate, measured = in_own_process(case)["peak"]
    assert estimate == pytest.approx(measured, rel=TARGET)

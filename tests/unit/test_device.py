"""GPUs or CPUs: chosen once, by --device, by the cluster or by this machine."""

from __future__ import annotations

import pytest

from tests.unit.fake_engine import make_config
from vime import platform
from vime.plan.report import gpu_gib
from vime.ray import slots
from vime.ray.preflight import check_cluster


@pytest.fixture(autouse=True)
def no_choice_yet(monkeypatch):
    monkeypatch.setenv("VIME_DEVICE", "")  # restored after the test
    monkeypatch.setenv("RAY_ADDRESS", "")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_flag_chooses_the_platform_before_the_other_checks(device, monkeypatch, tmp_path):
    monkeypatch.setattr(slots, "has_cuda", lambda: True)
    assert check_cluster(make_config(tmp_path, cluster={"device": device})) == []
    assert platform.current().device_type == device


def test_a_gpu_that_this_machine_lacks_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(slots, "has_cuda", lambda: False)
    (problem,) = check_cluster(make_config(tmp_path, cluster={"device": "cuda"}))
    assert problem.startswith("--device cuda: torch finds no GPU on this machine.")


def test_a_plan_for_gpus_is_made_where_there_are_none(monkeypatch, tmp_path):
    monkeypatch.setattr(platform, "_DEVICE_FILES", ())
    cfg = make_config(tmp_path, cluster={"device": "cuda"}, debug={"dry_run": True})
    assert check_cluster(cfg) == []
    assert platform.current() is platform.CUDA
    assert gpu_gib(cfg) is None


def test_without_the_flag_this_machine_decides(monkeypatch, tmp_path):
    monkeypatch.setattr(platform, "_DEVICE_FILES", ())
    assert check_cluster(make_config(tmp_path)) == []
    assert platform.current() is platform.CPU

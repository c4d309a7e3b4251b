"""A rollout generated ahead of training is saved with the checkpoint and loaded again."""

import dataclasses
import re

import numpy as np
import pytest

from tests.unit.fake_engine import make_config
from vime.config.fields import flags_in
from vime.errors import CheckpointError, PluginError
from vime.rollout.ahead import PACE, Ahead, ahead_path, load_ahead, save_ahead
from vime.types import RolloutFnTrainOutput, Sample, Status


@pytest.fixture
def cfg(tmp_path):
    return make_config("none", checkpoint={"save": str(tmp_path)})


def rollout(rollout_id: int, **fields) -> Ahead:
    sample = Sample(index=9, tokens=[1, 2], response_length=1, status=Status.COMPLETED, **fields)
    output = RolloutFnTrainOutput([[sample]], {"rollout/dropped": 2})
    return Ahead(rollout_id, output, {"sample_offset": 4, "buffer": []})


def test_a_rollout_generated_ahead_belongs_to_the_checkpoint_before_it(cfg, tmp_path):
    kept = rollout(6, reward=1.0, metadata={"turns": [1]})
    save_ahead(cfg, 5, kept)
    assert load_ahead(cfg, 5) == kept
    assert load_ahead(cfg, 4) is None
    assert [p.name for p in (tmp_path / "rollout").iterdir()] == ["ahead_of_5.pt"]


@pytest.mark.parametrize("latest", [None, rollout(5)], ids=["none", "trained already"])
def test_without_a_rollout_ahead_the_file_of_an_earlier_attempt_is_deleted(cfg, latest):
    save_ahead(cfg, 5, rollout(6))
    save_ahead(cfg, 5, latest)
    assert load_ahead(cfg, 5) is None
    assert not ahead_path(cfg.checkpoint.save, 5).exists()


def test_other_sampling_flags_make_it_generate_again(cfg, caplog):
    save_ahead(cfg, 5, rollout(6))
    warmer = make_config(
        "none", checkpoint={"load": cfg.checkpoint.save}, rollout={"temperature": 2.0}
    )
    assert load_ahead(warmer, 5) is None
    assert "other sampling flags" in caplog.text


def test_a_damaged_file_is_named_with_a_remedy(cfg):
    save_ahead(cfg, 5, rollout(6))
    path = ahead_path(cfg.checkpoint.save, 5)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))} is damaged.*Delete it"):
        load_ahead(cfg, 5)


def test_numpy_rewards_become_plain_and_unsavable_values_are_refused_before_the_commit(cfg):
    save_ahead(cfg, 5, rollout(6, reward=np.float64(0.5)))
    found = load_ahead(cfg, 5)
    assert found is not None
    assert found.output.samples[0][0].reward == 0.5
    with pytest.raises(PluginError, match=r"--save: .*\['metadata'\]\['tool'\] is a Pattern"):
        save_ahead(cfg, 5, rollout(6, metadata={"tool": re.compile("x")}))
    assert load_ahead(cfg, 5) == found


SHAPING = [
    (section, f.name)
    for section in ("data", "rollout", "reward")
    for f in dataclasses.fields(getattr(make_config("none"), section))
    if f.name not in ("log_path", *PACE)
]


@pytest.mark.parametrize(
    ("section", "name"),
    [*SHAPING, ("batch", "prompts"), ("batch", "samples_per_prompt")],
)
def test_every_flag_that_shapes_samples_is_compared(cfg, section, name, caplog):
    save_ahead(cfg, 5, rollout(6))
    other = getattr(cfg, section).changed(**{name: "another value"})
    assert load_ahead(dataclasses.replace(cfg, **{section: other}), 5) is None
    spec = flags_in(type(other)).get(name)
    assert (spec.name if spec else name) in caplog.text


def test_flags_of_logs_evaluations_and_training_keep_it(cfg):
    save_ahead(cfg, 5, rollout(6))
    later = dataclasses.replace(
        cfg,
        rollout=cfg.rollout.changed(log_path="mine.log"),
        batch=cfg.batch.changed(num_rollout=90),
        eval=cfg.eval.changed(interval=3),
    )
    assert load_ahead(later, 5) == rollout(6)

"""The examples under "How to add" in docs/architecture.md work unchanged."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit import test_papers
from tests.unit.command_lines import QWEN3_TINY
from tests.unit.fake_engine import make_config
from vime.algorithms.advantages import Estimator
from vime.config.fields import flag, flag_of
from vime.data.rewards import score_samples
from vime.errors import ConfigError, PluginError
from vime.plugins.hook import Hook, Plugin

PAGE = Path(__file__).parents[2] / "docs/architecture.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def made_by(phrase: str, **known: Any) -> dict[str, Any]:
    """The names that the page's code block with this phrase defines."""
    (code,) = (block for block in BLOCKS if phrase in block)
    names = dict(known)
    exec(compile(code, PAGE.name, "exec", dont_inherit=True), names)
    return names


def estimator() -> Estimator:
    known = {"Tensor": Tensor, "Estimator": Estimator, "ESTIMATORS": {}}
    return made_by("best_of_group_baseline", **known)["ESTIMATORS"]["best_of_group"]


def test_the_estimator_scores_the_best_of_a_group():
    assert estimator().baseline(torch.tensor([1.0, 3.0, 2.0])).tolist() == [0.0, 1.0, 0.0]


def test_the_estimator_agrees_with_its_paper():
    known = {name: getattr(test_papers, name) for name in ("Answer", "mean_of_answers", "GROUPS")}
    known |= {name: getattr(test_papers, name) for name in ("rewards_of", "surrogate")}
    papers = made_by("PAPERS[", Sequence=Sequence, Tensor=Tensor, torch=torch, PAPERS={}, **known)
    _, paper, num_groups = papers["PAPERS"]["best_of_group"]
    answers = test_papers.answers_of(0)[: num_groups * test_papers.SIZE]

    def scores(group: Sequence[Any]) -> Tensor:
        return estimator().baseline(test_papers.rewards_of(group))

    ours = test_papers.mean_of_answers(answers, test_papers.surrogate, scores)
    assert paper(answers).item() == pytest.approx(ours.item())


def test_the_grader_grades():
    grader = made_by("rm_hub.grader import Grader")["GRADER"]
    assert grader.needs_label
    assert [grader.quick(text, "12", {}) for text in (" 12\n", "13")] == [1.0, 0.0]


def test_the_hook_refuses_a_function_that_does_not_fit():
    names = made_by("AFTER_SAVE = Hook", Hook=Hook, flag=flag)
    spec = flag_of(names["after_save_path"])
    assert spec.hook is names["AFTER_SAVE"]
    wrong = Plugin(spec.name, f"{__name__}.saw_one", spec.hook)
    with pytest.raises(PluginError, match=r"Expected: f\(args, rollout_id, folder\)"):
        wrong("args", 1, "folder")


def test_the_hook_is_called_with_rollout_and_folder():
    seen = []
    run = SimpleNamespace(
        cfg=SimpleNamespace(
            checkpoint=SimpleNamespace(save="ckpt", plugin=lambda name: lambda *a: seen.append(a))
        )
    )
    made_by("if after_save :=", self=run, step=3, ArgsView=lambda cfg: "args")
    assert seen == [("args", 3, "ckpt")]


def saw_one(args: Any) -> None:
    """Takes too few arguments for the hook."""


def test_the_flag_scales_rewards_within_its_bounds():
    spec = flag_of(made_by("--reward-scale", flag=flag)["reward_scale"])
    assert spec.name == "--reward-scale"
    assert "too small" in spec.problem(0)
    cfg = SimpleNamespace(reward_scale=2.0)
    scaled = made_by("cfg.reward_scale * reward", cfg=cfg, rewards=[0.0, 1.0])["rewards"]
    algorithm = make_config("none", algorithm={"advantage_estimator": "dr_grpo"}).algorithm
    assert score_samples(scaled, [0, 0], algorithm) == [-1.0, 1.0]


def test_the_family_reads_a_config_and_refuses_what_it_lacks():
    family = made_by('title="Mistral 7B"')["FAMILY"]
    config = QWEN3_TINY | {"model_type": family.model_type}
    args = family.megatron_args(config)
    assert (args["num_layers"], args["qk_layernorm"], args["add_qkv_bias"]) == (3, False, False)
    assert {w.mcore for w in family.weights(args)} >= {"decoder.final_layernorm.weight"}
    with pytest.raises(ConfigError, match="sliding_window 4096"):
        family.megatron_args(config | {"sliding_window": 4096})

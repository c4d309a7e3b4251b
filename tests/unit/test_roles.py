"""--megatron-config-path: values that differ between actor and critic."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.unit.command_lines import refused, words
from vime.cli import parse_config

PPO = {"--advantage-estimator": "ppo"}


def written(folder, text: str) -> dict[str, str | None]:
    (folder / "roles.yaml").write_text(text)
    return {"--megatron-config-path": f"{folder}/roles.yaml"}


def entry(role: str, **overrides: object) -> str:
    lines = "".join(f"      {key}: {value}\n" for key, value in overrides.items())
    return f"  - name: default\n    role: {role}\n    overrides:\n{lines}"


def test_the_critic_has_its_own_values_and_otherwise_the_actors(tmp_path, capsys):
    text = "megatron:\n" + entry("actor", lr="1e-6", clip_grad=0.5, use_kl_loss="true")
    text += entry("critic", lr="1e-5", lr_warmup_iters=7, adam_beta2=0.99)
    argv = words(tmp_path, PPO | written(tmp_path, text) | {"--lr-warmup-iters": "2"})
    cfg = parse_config(argv)
    actor, critic = cfg.optimizer, cfg.optimizer.of_critic
    assert cfg.algorithm.use_kl_loss
    assert (actor.lr, actor.lr_warmup_iters, actor.clip_grad, actor.beta2) == (1e-6, 2, 0.5, 0.999)
    assert (critic.lr, critic.lr_warmup_iters) == (1e-5, 7)
    assert (critic.clip_grad, critic.beta2) == (0.5, 0.99)
    with pytest.raises(SystemExit):
        parse_config([*argv, "--dry-run"])
    assert "[critic]\n    --lr 1e-05\n    --lr-warmup-iters 7\n    --adam-beta2 0.99\n" in (
        capsys.readouterr().out
    )


def test_a_wrong_value_of_the_critic_is_refused_when_python_drops_asserts(tmp_path):
    text = "megatron:\n" + entry("critic", min_lr=1)
    argv = words(tmp_path, PPO | written(tmp_path, text))
    code = f"from vime.cli import parse_config; parse_config({argv!r})"
    ran = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True)
    assert ran.returncode == 2
    assert "for the critic, --min-lr 1.0 is above" in ran.stderr


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        ("megatron: 3\n", {}, "has no list under `megatron:`"),
        ("megatron:\n" + entry("judge", lr=1), {}, "role 'judge' is unknown or repeated. Write"),
        (
            "megatron:\n" + entry("actor", lr=1) * 2,
            {},
            "role 'actor' is unknown or repeated. Write",
        ),
        (
            "megatron:\n  - role: actor\n    lr: 1\n",
            {},
            "lr is not a key of an entry. Move it under",
        ),
        ("megatron:\n" + entry("actor", lrr=1), {}, "lrr is not a flag. Did you mean lr?"),
        ("megatron:\n" + entry("actor", lr="fast"), {}, "actor: --lr fast is not a number"),
        ("megatron:\n" + entry("actor", num_gpus_per_node=4), {}, "holds for the whole run"),
        ("megatron:\n" + entry("actor", lr=1), {"--lr": "2"}, "gives 1.0, and the command line"),
        ("megatron:\n" + entry("critic", lr=1), PPO | {"--critic-lr": "2"}, "--critic-lr 2.0."),
        ("megatron:\n" + entry("critic", lr=1), {}, "there is no critic. Add"),
        ("megatron:\n" + entry("critic", save="x"), PPO, "save cannot differ for the critic"),
        ("megatron:\n" + entry("critic", min_lr=1), PPO, "for the critic, --min-lr 1.0 is above"),
    ],
)
def test_a_wrong_entry_is_refused(capsys, tmp_path, text, flags, expected):
    (problem,) = refused(capsys, tmp_path, flags | written(tmp_path, text))
    assert problem.startswith(f"--megatron-config-path {tmp_path}/roles.yaml")
    assert expected in problem


def test_the_command_line_may_repeat_a_value_of_the_file(tmp_path):
    text = "megatron:\n" + entry("actor", lr="1e-6", sequence_parallel="false")
    assert parse_config(words(tmp_path, written(tmp_path, text) | {"--lr": "1e-6"}))

"""GAE and the critic's loss, compared with arithmetic that a reader can redo."""

import pytest
import torch

from tests.unit.command_lines import refused, words
from vime.algorithms.critic import clipped_value_loss, generalized_advantages
from vime.cli import parse_config

PPO = {"--advantage-estimator": "ppo"}


def close(actual, expected, tol=1e-6):
    torch.testing.assert_close(actual.float(), torch.tensor(expected), rtol=tol, atol=tol)


def test_advantages_are_sums_of_discounted_temporal_differences():
    rewards, values = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.5, 0.2, 0.4])
    # temporal differences with gamma 0.5: 0.1 - 0.5, 0.2 - 0.2, 1 - 0.4
    adv, returns = generalized_advantages(rewards, values, gamma=0.5, lambd=0.5)
    # 0.6; 0 + 0.25 x 0.6 = 0.15; -0.4 + 0.25 x 0.15 = -0.3625
    close(adv, [-0.3625, 0.15, 0.6])
    close(returns, [0.1375, 0.35, 1.0])


def test_with_lambda_zero_only_the_next_value_counts():
    rewards, values = torch.tensor([0.25, 0.0, 1.0]), torch.tensor([0.5, 0.2, 0.4])
    adv, returns = generalized_advantages(rewards, values, gamma=1.0, lambd=0.0)
    close(adv, [-0.05, 0.2, 0.6])
    close(returns, [0.45, 0.4, 1.0])


def test_with_lambda_one_the_advantage_is_the_reward_to_go_minus_the_value():
    rewards, values = torch.tensor([-0.5, 0.25, 1.0]), torch.tensor([0.5, 0.2, 0.4])
    adv, returns = generalized_advantages(rewards, values, gamma=1.0, lambd=1.0)
    close(returns, [0.75, 1.25, 1.0])
    close(adv, [0.25, 1.05, 0.6])


def test_advantages_are_the_sum_in_the_paper_of_gae():
    """Eq. 16 of arXiv:1506.02438: A_t = sum over l of (gamma lambda)^l delta_{t+l}."""
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 40, generator=g).double()
    gamma, lambd = 0.98, 0.93
    delta = rewards + gamma * torch.cat([values[1:], torch.zeros(1)]) - values
    expected = [sum((gamma * lambd) ** i * d for i, d in enumerate(delta[t:])) for t in range(40)]
    adv, returns = generalized_advantages(rewards, values, gamma=gamma, lambd=lambd)
    torch.testing.assert_close(adv, torch.stack(expected))
    torch.testing.assert_close(returns, torch.stack(expected) + values)


def test_a_value_that_moved_past_the_clip_towards_its_return_has_no_gradient():
    # all values start at 4 with a clip of 0.2; returns 5, 5, 3, 3
    value = torch.tensor([4.5, 4.1, 4.5, 3.5], requires_grad=True)
    old, returns = torch.full((4,), 4.0), torch.tensor([5.0, 5.0, 3.0, 3.0])
    loss = clipped_value_loss(value, old, returns, clip=0.2)
    # max(0.25, 0.64) / 2; 0.81 / 2; max(2.25, 1.44) / 2, unclipped in the wrong direction; as first
    close(loss.value_T.detach(), [0.32, 0.405, 1.125, 0.32])
    close(loss.stats["value_clipfrac"], [1.0, 0.0, 0.0, 1.0])
    loss.value_T.sum().backward()
    close(value.grad, [0.0, -0.9, 1.5, 0.0])


def test_the_critic_has_its_own_learning_rate_or_the_actors(tmp_path):
    cfg = parse_config(words(tmp_path, PPO | {"--lr": "1e-5", "--lr-warmup-iters": "7"}))
    assert (cfg.optimizer.of_critic.lr, cfg.optimizer.of_critic.lr_warmup_iters) == (1e-5, 7)
    own = {"--critic-lr": "1e-3", "--critic-lr-warmup-iters": "2", "--lr-warmup-fraction": "0.1"}
    critic = parse_config(words(tmp_path, PPO | own)).optimizer.of_critic
    assert (critic.lr, critic.lr_warmup_iters, critic.lr_warmup_fraction) == (1e-3, 2, None)


REFUSED = {
    "lambda without a critic": (
        {"--lambd": "0.9"},
        "--lambd 0.9 has no effect without a critic. Add --advantage-estimator ppo, or leave it "
        "out.",
    ),
    "a critic's rate without a critic": (
        {"--critic-lr": "1e-5"},
        "--critic-lr 1e-05 has no effect without a critic. Add --advantage-estimator ppo, or leave "
        "it out.",
    ),
    "nothing left for the actor": (
        PPO | {"--num-critic-only-steps": "3"},
        "--num-critic-only-steps 3 leaves no rollout of --num-rollout 3 for the actor. Lower "
        "the first, or raise the second.",
    ),
    "a minimum rate above the critic's": (
        PPO | {"--lr": "1e-3", "--min-lr": "1e-4", "--critic-lr": "1e-5"},
        "--min-lr 0.0001 is above --critic-lr 1e-05. Lower it.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_flags_of_a_critic_that_cannot_work_are_refused(case, capsys, tmp_path):
    changes, problem = REFUSED[case]
    assert refused(capsys, tmp_path, changes) == [problem]

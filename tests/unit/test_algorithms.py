"""Losses and advantages, compared with arithmetic that a reader can redo."""

import math

import pytest
import torch

from benchmarks.tables import table_in
from tools.docs_tables import estimator_table
from vime.algorithms.advantages import (
    ESTIMATORS,
    centred_baseline,
    discounted_returns,
    estimators_where,
    grpo_baseline,
    leave_one_out_baseline,
    mean_scaled_baseline,
    same_for_every_token,
    step_rewards,
    steps_of,
    whiten,
)
from vime.algorithms.critic import generalized_advantages
from vime.algorithms.kl import KL_TYPES, kl_estimate
from vime.algorithms.objective import PolicyObjective, sft_loss
from vime.algorithms.policy import clipped_policy_loss


def close(actual, expected, tol=1e-6):
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=tol, atol=tol)


def test_the_clip_limits_a_ratio_above_the_bound_and_stops_its_gradient():
    logp = torch.tensor([2.0, 1.1]).log().requires_grad_()
    loss = clipped_policy_loss(logp, torch.zeros(2), torch.ones(2), clip_low=0.2, clip_high=0.28)
    close(loss.value_T.detach(), [-1.28, -1.1])
    close(loss.stats["pg_clipfrac"], [1.0, 0.0])
    close(loss.stats["ppo_kl"], [-math.log(2.0), -math.log(1.1)])
    loss.value_T.sum().backward()
    close(logp.grad, [0.0, -1.1])


def test_the_clip_limits_a_ratio_below_the_bound_if_the_advantage_is_negative():
    logp = torch.tensor([0.5, 0.9, 3.0]).log().requires_grad_()
    adv = torch.tensor([-1.0, -1.0, -1.0])
    loss = clipped_policy_loss(logp, torch.zeros(3), adv, clip_low=0.2, clip_high=0.28)
    close(loss.value_T.detach(), [0.8, 0.9, 3.0])
    close(loss.stats["pg_clipfrac"], [1.0, 0.0, 0.0])
    loss.value_T.sum().backward()
    close(logp.grad, [0.0, 0.9, 3.0])


def test_dual_clip_limits_the_loss_of_a_token_with_negative_advantage_and_a_large_ratio():
    logp = torch.tensor([5.0, 2.0, 5.0]).log().requires_grad_()
    adv = torch.tensor([-2.0, -1.0, 0.5])
    loss = clipped_policy_loss(
        logp, torch.zeros(3), adv, clip_low=0.2, clip_high=0.2, dual_clip=3.0
    )
    close(loss.value_T.detach(), [6.0, 2.0, -0.6])
    close(loss.stats["pg_clipfrac"], [1.0, 0.0, 1.0])
    loss.value_T.sum().backward()
    close(logp.grad, [0.0, 2.0, 0.0])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("k1", math.log(2)),
        ("k2", math.log(2) ** 2 / 2),
        ("k3", 0.5 - 1 + math.log(2)),
        ("low_var_kl", 0.5 - 1 + math.log(2)),
    ],
)
def test_kl_of_a_token_twice_as_likely_as_under_the_reference(kind, expected):
    close(kl_estimate(torch.tensor([0.5]).log(), torch.tensor([0.25]).log(), kind), [expected])


@pytest.mark.parametrize("kind", KL_TYPES)
def test_kl_to_itself_is_exactly_zero(kind):
    logp = torch.randn(9)
    assert kl_estimate(logp, logp.clone(), kind).abs().max() == 0


def test_low_var_kl_is_at_most_10_where_k3_exceeds_1000():
    logp, ref = torch.tensor([-9.0]), torch.tensor([0.0])
    assert kl_estimate(logp, ref, "k3") > 1000
    close(kl_estimate(logp, ref, "low_var_kl"), [10.0])


GROUP_BASELINES = (
    grpo_baseline,
    centred_baseline,
    leave_one_out_baseline,
    mean_scaled_baseline,
)


def test_grpo_divides_by_the_unbiased_std():
    # mean 0.5; the squares add up to 4 x 0.25; divided by 3: std 0.57735
    scores = grpo_baseline(torch.tensor([1.0, 0.0, 1.0, 0.0]))
    close(scores, [0.866024, -0.866024, 0.866024, -0.866024], tol=1e-5)


def test_an_all_equal_group_scores_exactly_zero():
    rewards = torch.full((7,), 0.1)
    for baseline in GROUP_BASELINES:
        assert baseline(rewards).abs().max() == 0


def test_a_group_of_one_scores_zero():
    for baseline in GROUP_BASELINES:
        assert baseline(torch.tensor([3.0])).tolist() == [0.0]


def test_leave_one_out_subtracts_the_mean_of_the_others():
    close(leave_one_out_baseline(torch.tensor([3.0, 0.0, 0.0])), [3.0, -1.5, -1.5])


def test_maxrl_gives_a_rare_success_a_higher_score():
    close(mean_scaled_baseline(torch.tensor([1.0, 0.0, 0.0, 0.0])), [3.0, -1.0, -1.0, -1.0])
    close(mean_scaled_baseline(torch.tensor([1.0, 1.0, 1.0, 0.0])), [1 / 3, 1 / 3, 1 / 3, -1.0])
    assert mean_scaled_baseline(torch.zeros(4)).tolist() == [0.0] * 4


def test_the_penalty_of_each_token_is_subtracted_from_the_score():
    close(same_for_every_token(2.0, torch.tensor([0.0, 0.5, -0.5]), 1.0), [2.0, 1.5, 2.5])


def test_returns_to_go_discount_the_score_and_the_later_penalties():
    penalty = torch.tensor([1.0, 2.0, 3.0])
    close(discounted_returns(10.0, penalty, 1.0), [4.0, 5.0, 7.0])
    # 7; 0.5 x 7 - 2 = 1.5; 0.5 x 1.5 - 1 = -0.25
    close(discounted_returns(10.0, penalty, 0.5), [-0.25, 1.5, 7.0])


def test_discounting_skips_the_tokens_of_a_tool_with_and_without_a_critic():
    """The policy wrote the tokens 0, 3 and 4, a tool wrote 1 and 2. Score 8, gamma 0.5."""
    steps = steps_of(torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]))
    assert steps.tolist() == [0, 3, 4]
    penalty = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])[steps]
    # 8; 0.5 x 8 = 4; 0.5 x 4 - 1 = 1
    expected = [1.0, 4.0, 8.0]
    close(discounted_returns(8.0, penalty, 0.5), expected)
    _, returns = generalized_advantages(
        step_rewards(8.0, penalty), torch.tensor([0.3, 0.2, 0.1]), gamma=0.5, lambd=1.0
    )
    close(returns.float(), expected)


def test_a_response_without_a_step_has_no_advantage():
    none = steps_of(torch.zeros(4))
    assert discounted_returns(8.0, torch.zeros(4)[none], 0.5).tolist() == []
    adv, returns = generalized_advantages(torch.zeros(0), torch.zeros(0), gamma=0.5, lambd=0.5)
    assert (adv.tolist(), returns.tolist()) == ([], [])


def test_whitening_ignores_masked_tokens_and_sums_over_ranks():
    values, mask = torch.tensor([1.0, 3.0, 99.0]), torch.tensor([1.0, 1.0, 0.0])
    close(whiten(values, mask, lambda x: x), [-0.707107, 0.707107, 0.0], tol=1e-5)
    # two ranks with the same tokens: mean 2; squares 4 x 1, divided by 3: std 1.154701
    close(whiten(values, mask, lambda x: 2 * x), [-0.866025, 0.866025, 0.0], tol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_whitening_gives_zeros_for_equal_values_a_single_value_or_none(count):
    mask = torch.tensor([1.0] * count + [0.0] * (4 - count))
    white = whiten(torch.full((4,), 0.1), mask, lambda total: total)
    close(white, [0.0] * 4)


def test_the_objective_adds_kl_and_subtracts_entropy():
    objective = PolicyObjective(
        clip_low=0.2, clip_high=0.2, kl_coef=0.1, kl_type="k1", entropy_coef=0.01
    )
    logp = torch.zeros(1, requires_grad=True)
    out = objective(
        logp,
        old_logp_T=torch.zeros(1),
        adv_T=torch.ones(1),
        entropy_T=torch.tensor([2.0]),
        ref_logp_T=torch.tensor([-0.5]),
    )
    close(out.value_T.detach(), [-1 + 0.1 * 0.5 - 0.01 * 2.0])
    assert set(out.stats) == {"pg_loss", "pg_clipfrac", "ppo_kl", "kl_loss", "entropy_loss"}
    out.value_T.sum().backward()
    close(logp.grad, [-1 + 0.1])


def test_an_infinite_term_with_coefficient_zero_is_reported_and_leaves_the_gradient_finite():
    logp = torch.zeros(1, requires_grad=True)
    infinite = torch.tensor([-math.inf])
    out = PolicyObjective(kl_type="k1")(
        logp, old_logp_T=torch.zeros(1), adv_T=torch.ones(1), ref_logp_T=infinite
    )
    assert out.stats["kl_loss"].isinf().all()
    out.value_T.sum().backward()
    close(logp.grad, [-1.0])


def test_sft_loss_is_the_negative_log_likelihood():
    close(sft_loss(torch.tensor([-0.5, -2.0])).value_T, [0.5, 2.0])


TRAITS = {
    "grpo": {"group_baseline", "dual_clip"},
    "gspo": {"group_baseline", "dual_clip", "sequence_ratio"},
    "cispo": {"group_baseline"},
    "dr_grpo": {"group_baseline", "dual_clip", "constant_weight"},
    "rloo": {"group_baseline", "dual_clip"},
    "maxrl": {"group_baseline", "dual_clip", "nonnegative_rewards"},
    "reinforce_plus_plus": {"uses_gamma", "whiten", "dual_clip"},
    "reinforce_plus_plus_baseline": {"group_baseline", "whiten", "dual_clip"},
    "ppo": {"critic", "uses_gamma", "dual_clip"},
}


@pytest.mark.parametrize("name", TRAITS)
def test_an_estimator_has_the_traits_of_its_paper(name):
    estimator, known = ESTIMATORS[name], set().union(*TRAITS.values())
    assert {trait for trait in known if getattr(estimator, trait)} == TRAITS[name]


def test_messages_list_the_estimators_with_a_trait():
    assert estimators_where(lambda e: e.whiten).startswith(
        "reinforce_plus_plus or reinforce_plus_plus_baseline"
    )


def test_the_documentations_table_says_what_the_registry_says():
    written = table_in("algorithms.md", "estimator-list").splitlines()
    known = estimator_table().splitlines()
    assert len(written) >= 2 + len(TRAITS)
    assert [row for row in known if row in written] == written

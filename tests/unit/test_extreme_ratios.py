"""Policies that are far apart: every loss stays finite, and so does its gradient.

A difference of log-probabilities of 90 overflows exp in float32; a run that diverged may have 1e4.
Within the usual range, no value may differ from the plain formula.
"""

import itertools

import pytest
import torch

from vime.algorithms.advantages import ESTIMATORS
from vime.algorithms.kl import KL_TYPES, kl_estimate, unbiased_kl
from vime.algorithms.objective import PolicyObjective
from vime.algorithms.off_policy import LEVELS, MODES, Mismatch, divergences
from vime.algorithms.policy import cispo_loss, clipped_policy_loss
from vime.algorithms.ratios import ratio_of

DTYPES = (torch.float32, torch.bfloat16)
FAR = (0.0, 21.0, -21.0, 90.0, -90.0, 1e4, -1e4)
USUAL = torch.linspace(-20, 20, 4001)

PLAIN_KL = {
    "k1": lambda d: d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: (-d).exp() - 1 + d,
    "low_var_kl": lambda d: ((-d).exp() - 1 + d).clamp(-10, 10),
}


def pairs_of_differences(dtype):
    """Two columns that hold every pair of differences, each with its sign of the advantage."""
    rows = torch.tensor(list(itertools.product(FAR, FAR, (1.0, -1.0))))
    return (column.to(dtype) for column in rows.unbind(1))


def assert_finite(objective, dtype):
    """old - new, and the difference to reference and engine, take every pair of values."""
    new_less_old, new_less_other, adv = pairs_of_differences(dtype)
    logp = torch.zeros_like(adv).requires_grad_()
    loss = objective(
        logp,
        old_logp_T=-new_less_old,
        adv_T=adv,
        entropy_T=torch.ones_like(adv),
        ref_logp_T=-new_less_other,
        rollout_logp_T=-new_less_other,
        # each token is a sequence: a mean over several would be far from the extremes
        sequence_sum=lambda values_T: values_T.detach(),
    )
    assert loss.value_T.isfinite().all()
    for name, value_T in loss.stats.items():
        assert value_T.isfinite().all(), name
    (gradient,) = torch.autograd.grad(loss.value_T.sum(), logp)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("kind", KL_TYPES)
@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_with_every_kl_is_finite(estimator, dual_clip, kind, unbiased, dtype):
    traits = ESTIMATORS[estimator]
    objective = PolicyObjective(
        policy_loss=traits.policy_loss,
        sequence_ratio=traits.sequence_ratio,
        dual_clip=dual_clip,
        kl_coef=0.1,
        kl_type=kind,
        unbiased_kl=unbiased,
        entropy_coef=0.01,
        opsm_delta=1e-4,
    )
    assert_finite(objective, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("veto", [None, 1e-4])
def test_every_correction_is_finite(veto, level, mode, dtype):
    mismatch = Mismatch(low=0.5, high=2.0, level=level, mode=mode, veto=veto)
    assert_finite(PolicyObjective(mismatch=mismatch), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KL_TYPES)
def test_a_kl_beyond_the_largest_ratio_pushes_no_token_the_wrong_way(kind, dtype):
    """Towards the reference, or nowhere: d grows where it is below 0, and shrinks above 0."""
    diff = torch.tensor([d for d in FAR if d], dtype=dtype, requires_grad=True)
    kl = kl_estimate(diff, torch.zeros_like(diff), kind)
    (gradient,) = torch.autograd.grad(kl.sum(), diff)
    assert kl.isfinite().all()
    assert gradient.isfinite().all()
    if kind != "k1":  # its gradient is 1 everywhere
        assert (gradient * diff.detach() >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_divergences_of_a_far_engine_are_finite(dtype):
    for value_T in divergences(torch.tensor(FAR, dtype=dtype)).values():
        assert value_T.isfinite().all()


def test_low_var_kl_at_minus_90_is_10_without_a_gradient():
    logp = torch.tensor([-90.0], requires_grad=True)
    kl = kl_estimate(logp, torch.zeros(1), "low_var_kl")
    kl.sum().backward()
    assert (kl.item(), logp.grad.item()) == (10.0, 0.0)


def test_a_ratio_of_exp_90_has_the_clipped_loss_without_a_gradient():
    logp = torch.tensor([90.0], requires_grad=True)
    loss = clipped_policy_loss(logp, torch.zeros(1), torch.ones(1), clip_low=0.2, clip_high=0.25)
    loss.value_T.sum().backward()
    assert (loss.value_T.item(), logp.grad.item()) == (-1.25, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KL_TYPES)
def test_a_usual_kl_and_its_gradient_equal_the_plain_formula_to_the_bit(kind, dtype):
    mine, plain = (USUAL.to(dtype).requires_grad_() for _ in range(2))
    zero = torch.zeros_like(USUAL, dtype=dtype)
    found, expected = kl_estimate(mine, zero, kind), PLAIN_KL[kind](plain)
    assert torch.equal(found, expected)
    found = torch.autograd.grad(found.sum(), mine, retain_graph=True)[0]
    assert torch.equal(found, torch.autograd.grad(expected.sum(), plain, retain_graph=True)[0])
    assert torch.equal(unbiased_kl(mine, zero, zero, kind), plain.exp() * PLAIN_KL[kind](plain))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_usual_ratio_and_its_gradient_equal_exp_to_the_bit(dtype):
    mine, plain = (USUAL.to(dtype).requires_grad_() for _ in range(2))
    assert torch.equal(ratio_of(mine), plain.exp())
    found = torch.autograd.grad(ratio_of(mine).sum(), mine)[0]
    assert torch.equal(found, torch.autograd.grad(plain.exp().sum(), plain)[0])


def test_cispo_at_a_far_ratio_keeps_the_gradient_of_its_bound():
    logp = torch.tensor([90.0, -90.0], requires_grad=True)
    loss = cispo_loss(logp, torch.zeros(2), torch.ones(2), clip_low=0.5, clip_high=0.25)
    loss.value_T.sum().backward()
    assert logp.grad.tolist() == [-1.25, -0.5]

"""Sequence ratios, importance weights and masks, compared with arithmetic to redo by hand."""

import itertools
import math

import pytest
import torch

from tests.unit.fake_engine import make_config
from vime.algorithms.kl import unbiased_kl
from vime.algorithms.objective import PolicyObjective
from vime.algorithms.off_policy import LEVELS, MODES, Mismatch, opsm_mask
from vime.algorithms.policy import cispo_loss, one_sequence, sequence_ratio
from vime.backends.megatron.training.losses import objective_of
from vime.config.fields import flags_in
from vime.config.sections.algorithm import AlgorithmConfig
from vime.errors import ConfigError

SEQUENCES = torch.tensor([0, 0, 1])  # two tokens of the first sequence, one of the second


def close(actual, expected, tol=1e-6):
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=tol, atol=tol)


def sequence_sum(values):
    return torch.zeros(2).index_add(0, SEQUENCES, values.detach())[SEQUENCES]


def run(objective, logp, adv=(1.0, 1.0, 1.0), **known):
    logp = torch.tensor(logp, requires_grad=True)
    out = objective(
        logp,
        old_logp_T=torch.zeros(3),
        adv_T=torch.tensor(adv),
        sequence_sum=sequence_sum,
        **known,
    )
    out.value_T.sum().backward()
    return out, logp.grad


def test_gspo_gives_every_token_the_geometric_mean_of_the_ratios_in_its_sequence():
    # means of the log-ratios: 0.2 and -0.1
    objective = PolicyObjective(sequence_ratio=True, clip_low=0.5, clip_high=0.5)
    out, grad = run(objective, [0.4, 0.0, -0.1])
    ratios = [math.exp(0.2), math.exp(0.2), math.exp(-0.1)]
    close(out.value_T.detach(), [-r for r in ratios])
    close(grad, [-r for r in ratios])
    # ppo_kl is the sequence's mean at each token, so its sum is that of the tokens' own
    close(sequence_sum(out.stats["ppo_kl"]), [-0.4, -0.4, 0.1])


def test_gspo_clips_whole_sequences():
    out, grad = run(PolicyObjective(sequence_ratio=True), [0.4, 0.0, -0.1])
    close(out.stats["pg_clipfrac"], [1.0, 1.0, 0.0])
    close(grad, [0.0, 0.0, -math.exp(-0.1)])


def test_the_gradient_of_gspo_is_the_gradient_of_the_ratio_in_its_paper():
    g = torch.Generator().manual_seed(0)
    old, theta = torch.randn(2, 5, generator=g) * 0.1
    plain = theta.clone().requires_grad_()
    (-(plain - old).mean().exp() * -0.7).backward()
    mine = theta.clone().requires_grad_()
    objective = PolicyObjective(sequence_ratio=True, clip_low=9.0, clip_high=9.0)
    out = objective(mine, old_logp_T=old, adv_T=torch.full((5,), -0.7))
    out.value_T.mean().backward()
    torch.testing.assert_close(mine.grad, plain.grad)


def test_the_sequence_ratio_is_exactly_one_before_the_policy_changes():
    logp = torch.randn(7)
    assert torch.equal(sequence_ratio(logp, logp.clone(), one_sequence), logp)


def test_cispo_clips_the_weight_and_keeps_every_gradient():
    logp = torch.tensor([0.5, 0.125]).log().requires_grad_()
    old = torch.tensor([0.25, 0.25]).log()  # ratios 2 and 1/2
    adv = torch.tensor([2.0, -1.0])
    loss = cispo_loss(logp, old, adv, clip_low=0.2, clip_high=0.28)
    close(loss.value_T.detach(), [-2.56 * math.log(0.5), 0.8 * math.log(0.125)])
    close(loss.stats["pg_clipfrac"], [1.0, 1.0])
    close(loss.stats["ppo_kl"], [-math.log(2), math.log(2)])
    loss.value_T.sum().backward()
    close(logp.grad, [-2.56, 0.8])


WEIGHTS = [
    ("token", "clip", [2.0, 0.6, 0.6]),
    ("token", "mask", [0.0, 0.0, 0.0]),
    ("sequence", "clip", [1.5, 1.5, 0.6]),
    ("sequence", "mask", [1.5, 1.5, 0.0]),
    ("geometric", "clip", [math.sqrt(1.5)] * 2 + [0.6]),
    ("geometric", "mask", [math.sqrt(1.5)] * 2 + [0.0]),
]


@pytest.mark.parametrize(("level", "mode", "expected"), WEIGHTS)
def test_importance_weights_by_level_and_mode(level, mode, expected):
    # ratios of trainer and engine: 3 and 0.5 in the first sequence, 0.25 in the second
    # bounds: 0.6 and 2
    old = torch.tensor([3.0, 0.5, 0.25]).log()
    mismatch = Mismatch(low=0.6, high=2.0, level=level, mode=mode)
    weights, _ = mismatch.weights(old, torch.zeros(3), sequence_sum)
    close(weights, expected)


@pytest.mark.parametrize("level", LEVELS)
def test_one_token_with_a_tiny_ratio_vetoes_its_sequence_at_every_level(level):
    # the ratio of the second token is 1e-5; the other sequence keeps its weight of 0.25
    old = torch.tensor([3.0, 1e-5, 0.25]).log()
    mismatch = Mismatch(level=level, veto=1e-4)
    weights, stats = mismatch.weights(old, torch.zeros(3), sequence_sum)
    close(weights, [0.0, 0.0, 0.25])
    close(stats["tis_vetofrac"], [1.0, 1.0, 0.0])
    kept, _ = Mismatch(level=level, veto=1e-6).weights(old, torch.zeros(3), sequence_sum)
    plain, _ = Mismatch(level=level).weights(old, torch.zeros(3), sequence_sum)
    assert torch.equal(kept, plain)


def test_tis_weights_the_loss_and_its_gradient_and_reports_the_clipped_fraction():
    objective = PolicyObjective(mismatch=Mismatch(high=2.0))
    rollout = torch.tensor([1 / 3, 2.0, 1.0]).log()
    out, grad = run(objective, [0.0, 0.0, 0.0], rollout_logp_T=rollout)
    close(out.value_T.detach(), [-2.0, -0.5, -1.0])
    close(out.stats["pg_loss"], [-2.0, -0.5, -1.0])
    close(grad, [-2.0, -0.5, -1.0])
    close(out.stats["tis"], [3.0, 0.5, 1.0])
    close(out.stats["tis_clipfrac"], [1.0, 0.0, 0.0])


def test_the_weight_of_a_huge_ratio_is_finite():
    weights, stats = Mismatch(high=2.0).weights(
        torch.tensor([500.0]), torch.tensor([0.0]), one_sequence
    )
    close(weights, [2.0])
    assert stats["tis"].isfinite().all()


def test_opsm_drops_tokens_with_negative_advantage_in_sequences_that_drifted():
    # drift of the first sequence: (0.3 - 0.1) / 2 = 0.1; of the second: 0.2
    old = torch.tensor([0.3, -0.1, 0.2])
    adv = torch.tensor([-1.0, 0.5, -1.0])
    assert opsm_mask(torch.zeros(3), old, adv, sequence_sum, delta=0.15).tolist() == [
        False,
        False,
        True,
    ]
    out, grad = run(PolicyObjective(opsm_delta=0.05), [-0.3, 0.1, -0.2], adv=(-1.0, 0.5, -1.0))
    close(out.stats["opsm_clipfrac"], [1.0, 0.0, 1.0])
    close(grad, [0.0, -0.5 * math.exp(0.1), 0.0])


def test_the_gradient_of_the_unbiased_kl_is_the_ratio_times_the_log_ratio_to_the_reference():
    logp = torch.tensor([0.5]).log().requires_grad_()
    quarter = torch.tensor([0.25]).log()
    kl = unbiased_kl(logp, quarter, quarter, "k3")
    close(kl.detach(), [2 * (0.5 - 1 + math.log(2))])
    kl.sum().backward()
    close(logp.grad, [2 * math.log(2)])


def test_the_objective_adds_the_unbiased_kl():
    objective = PolicyObjective(kl_coef=1.0, kl_type="k1", unbiased_kl=True)
    out, _ = run(objective, [math.log(2), 0.0, 0.0], adv=(0.0,) * 3, ref_logp_T=torch.ones(3))
    close(out.value_T.detach(), [2 * (math.log(2) - 1), -1.0, -1.0])


KNOWN = {"entropy_T": None, "ref_logp_T": None, "rollout_logp_T": None}


def reinforce(args, logp_T, *, adv_T, **known):
    return -adv_T * logp_T, {"seen": logp_T * args.rollout_batch_size}


def test_a_users_loss_replaces_the_objective():
    cfg = make_config("none", algorithm={"custom_loss_path": f"{__name__}.reinforce"})
    out, grad = run(objective_of(cfg), [-1.0, -2.0, -3.0], **KNOWN)
    close(grad, [-1.0, -1.0, -1.0])
    close(out.stats["seen"], [-2.0, -4.0, -6.0])
    assert not out.stats["seen"].requires_grad


def halve(args, *, pg_loss, train_log_probs, rollout_log_probs, sequence_sum):
    return pg_loss / 2, {"apart": train_log_probs - rollout_log_probs}


def test_a_users_correction_gets_the_log_probabilities_of_trainer_and_engine():
    algorithm = {"custom_tis_path": f"{__name__}.halve", "use_tis": True, "clip_high_asked": 9.0}
    known = KNOWN | {"rollout_logp_T": torch.ones(3), "entropy_T": torch.zeros(3)}
    out, grad = run(objective_of(make_config("none", algorithm=algorithm)), [0.0] * 3, **known)
    close(grad, [-0.5, -0.5, -0.5])
    close(out.stats["apart"], [-1.0, -1.0, -1.0])


def test_the_flags_offer_every_level_and_mode():
    flags = flags_in(AlgorithmConfig)
    assert flags["tis_level"].choices == tuple(LEVELS) == ("token", "sequence", "geometric")
    assert flags["tis_mode"].choices == tuple(MODES) == ("clip", "mask")
    assert [case[:2] for case in WEIGHTS] == list(itertools.product(LEVELS, MODES))


def test_a_users_loss_is_a_policy_loss_under_both_loss_types():
    for loss_type in ("policy_loss", "custom_loss"):
        asked = AlgorithmConfig(
            loss_type=loss_type, custom_loss_path="a.b", use_kl_loss=True, mismatch_metrics=True
        )
        assert asked.needs_reward
        assert asked.needs_reference
        assert asked.needs_rollout_logp == "--get-mismatch-metrics"
    assert not AlgorithmConfig(loss_type="sft_loss").needs_reward


@pytest.mark.parametrize(
    ("asked", "flags"),
    [
        ({"unbiased_kl": True}, "--use-unbiased-kl .*--use-kl-loss"),
        (
            {"use_tis": True, "use_rollout_logprobs": True},
            "--use-tis .*--use-rollout-logprobs",
        ),
        (
            {"keep_old_actor": True, "use_rollout_logprobs": True},
            "--keep-old-actor .*--use-rollout-logprobs",
        ),
        ({"keep_old_actor": True, "loss_type": "sft_loss"}, "--keep-old-actor .*--loss-type sft"),
        ({"use_tis": True, "tis_clip_low": 3.0}, "--tis-clip-low 3.0 .*--tis-clip 2.0"),
        ({"tis_veto": 1e-4}, "--tis-veto 0.0001 .*--use-tis"),
        (
            {"use_tis": True, "tis_veto": 1e-4, "custom_tis_path": "mine.tis"},
            "--tis-veto 0.0001 .*--custom-tis-function-path",
        ),
        ({"tis_mode": "mask"}, "--tis-mode mask .*--use-tis"),
        (
            {"advantage_estimator": "dr_grpo", "per_token_loss": True},
            "--calculate-per-token-loss .*--advantage-estimator dr_grpo",
        ),
        (
            {"advantage_estimator": "dr_grpo", "custom_reducer_path": "a.b"},
            "--custom-pg-loss-reducer-function-path a.b .*--advantage-estimator dr_grpo",
        ),
        (
            {"advantage_estimator": "maxrl", "overlong_buffer_len": 8},
            "--overlong-buffer-len 8 .*--advantage-estimator maxrl",
        ),
        ({"overlong_penalty": 2.0}, "--overlong-penalty-factor 2.0 .*--overlong-buffer-len"),
        (
            {"custom_loss_path": "a.b", "loss_type": "sft_loss"},
            "--custom-loss-function-path a.b .*--loss-type sft_loss",
        ),
        (
            {"custom_loss_path": "a.b", "use_tis": True},
            "--custom-loss-function-path a.b .*--use-tis",
        ),
        ({"loss_type": "custom_loss"}, "--loss-type custom_loss .*--custom-loss-function-path"),
        (
            {"custom_advantage_path": "a.b", "kl_coef": 0.1},
            "--custom-advantage-function-path a.b .*--kl-coef 0.1",
        ),
        ({"custom_tis_path": "a.b"}, "--custom-tis-function-path a.b .*--use-tis"),
        ({"ref_update_interval": 2}, "--ref-update-interval 2 .*--use-kl-loss or --kl-coef"),
    ],
)
def test_flags_that_exclude_each_other_are_refused_by_name(asked, flags):
    with pytest.raises(ConfigError, match=flags):
        AlgorithmConfig(**asked)

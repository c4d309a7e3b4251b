"""Every flag of the algorithm, under every estimator, changes the update or is named in a message.

`update_of` does on one small rollout what the trainer does with these flags: scores, advantages,
weights, and the loss of each token. The flags of `OUTSIDE` act elsewhere in the trainer.
"""

from dataclasses import fields

import pytest
import torch

from tests.unit.command_lines import words
from vime.algorithms.advantages import ESTIMATORS, step_rewards, whiten
from vime.algorithms.critic import clipped_value_loss, generalized_advantages
from vime.algorithms.kl import kl_estimate
from vime.backends.megatron.training.losses import objective_of
from vime.cli import parse_config
from vime.config import AlgorithmConfig
from vime.config.fields import flag_of
from vime.data.rewards import overlong_penalty, score_samples
from vime.data.train_batch import token_weights

KL = {"--use-kl-loss": None, "--kl-loss-coef": "0.1"}
TIS = {"--use-tis": None}
OPD = {"--use-opd": None, "--opd-type": "vllm", "--opd-teacher-url": "http://127.0.0.1:9"}

# flag: (its value, other flags that it needs)
CASES = {
    "--use-kl-loss": (None, {}),
    "--kl-loss-coef": ("0.3", {"--use-kl-loss": None}),
    "--kl-loss-type": ("k3", KL),
    "--use-unbiased-kl": (None, KL),
    "--kl-coef": ("0.5", {}),
    "--use-opd": (None, OPD),
    "--opd-kl-coef": ("0.5", OPD),
    "--entropy-coef": ("0.1", {}),
    "--eps-clip": ("0.05", {}),
    "--eps-clip-high": ("0.05", {}),
    "--eps-clip-c": ("1.1", {}),
    "--gamma": ("0.5", {}),
    "--lambd": ("0.5", {}),
    "--value-clip": ("0.01", {}),
    "--calculate-per-token-loss": (None, {}),
    "--normalize-advantages": (None, {}),
    "--disable-grpo-std-normalization": (None, {}),
    "--disable-rewards-normalization": (None, {}),
    "--overlong-buffer-len": ("1022", {}),
    "--overlong-penalty-factor": ("2.0", {"--overlong-buffer-len": "1022"}),
    "--use-tis": (None, {}),
    "--tis-clip": ("1.1", TIS),
    "--tis-clip-low": ("0.9", TIS),
    "--tis-level": ("geometric", TIS),
    "--tis-mode": ("mask", TIS),
    "--tis-veto": ("0.5", TIS),
    "--use-opsm": (None, {}),
    "--opsm-delta": ("0.9", {"--use-opsm": None}),
    # without the flags that they need, these must be refused or named
    "--kl-loss-coef alone": ("0.3", {}),
    "--kl-loss-type alone": ("k3", {}),
    "--use-unbiased-kl alone": (None, {}),
    "--opd-type alone": ("vllm", {}),
    "--opd-teacher-url alone": ("http://127.0.0.1:9", {}),
    "--opd-kl-coef alone": ("0.5", {}),
    "--overlong-penalty-factor alone": ("2.0", {}),
    "--tis-clip alone": ("1.1", {}),
    "--tis-clip-low alone": ("0.9", {}),
    "--tis-level alone": ("geometric", {}),
    "--tis-mode alone": ("mask", {}),
    "--tis-veto alone": ("0.5", {}),
    "--opsm-delta alone": ("0.5", {}),
    "--ref-update-interval alone": ("2", {}),
    "--num-critic-only-steps alone": ("1", {}),
    "--loss-type alone": ("custom_loss", {}),
    "--custom-tis-function-path alone": ("mine.f", {}),
    "--disable-compute-advantages-and-returns alone": (None, {}),
    "--disable-grpo-std-normalization beside": (None, {"--disable-rewards-normalization": None}),
}
# They choose what is computed, name a function, or set when something happens.
OUTSIDE = {
    "--advantage-estimator",
    "--use-rollout-logprobs",
    "--keep-old-actor",
    "--get-mismatch-metrics",
    "--seed",
    "--custom-loss-function-path",
    "--custom-advantage-function-path",
    "--custom-pg-loss-reducer-function-path",
    "--custom-megatron-init-path",
    "--custom-model-provider-path",
    "--custom-megatron-before-log-prob-hook-path",
    "--custom-megatron-before-train-step-hook-path",
}
OUTSIDE_FOR = {("--num-critic-only-steps alone", "ppo")}


def test_every_flag_of_the_section_has_a_case():
    specs = [spec for f in fields(AlgorithmConfig) if (spec := flag_of(f))]
    named = {case.split()[0] for case in CASES} | OUTSIDE
    assert {spec.negated or spec.name for spec in specs} == named


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("case", CASES)
def test_a_flag_changes_the_update_or_is_named(case, estimator, capsys, tmp_path):
    name, (value, others) = case.split()[0], CASES[case]
    base = {"--advantage-estimator": estimator} | {n: v for n, v in others.items() if n != name}
    changed = base | {name: value} | ({n: v for n, v in others.items() if n != name})
    if name == "--use-opd":
        base = {"--advantage-estimator": estimator}
    try:
        found = parse_config(words(tmp_path, changed)).algorithm
    except SystemExit:
        said = capsys.readouterr().err
        assert any(n in said for n in (name, *others))
        return
    if name in capsys.readouterr().err or (case, estimator) in OUTSIDE_FOR:
        return
    plain = parse_config(words(tmp_path, base)).algorithm
    assert not torch.equal(update_of(found), update_of(plain)), "accepted without any effect"


def update_of(a):
    """The weighted losses of tokens, their gradient, and a critic's loss, in one vector.

    A group of four answers of 10 to 13 tokens, each with a tool's token, under policies that are
    far apart.
    """
    g = torch.Generator().manual_seed(7)
    sizes = [10, 11, 12, 13]
    masks = [torch.ones(n) for n in sizes]
    for m in masks:
        m[3] = 0.0
    rewards = [1.0, 0.2, 0.6, 0.2]
    if a.overlong_buffer_len is not None:
        longest = 1024
        rewards = [
            r - overlong_penalty(n, longest, a.overlong_buffer_len, a.overlong_penalty)
            for r, n in zip(rewards, sizes, strict=True)
        ]
    scores = score_samples(rewards, [0] * 4, a)
    kept = torch.cat(masks) > 0
    steps = [int(m.sum()) for m in masks]
    noise = 0.6 * torch.randn(6, sum(steps), generator=g)
    old, ref, engine, teacher = (noise[:4] - 1).unbind()
    values, moved = noise[4], noise[5]
    penalty = a.kl_coef * kl_estimate(old, ref, "k1")
    adv, returns = [], []
    for score, part, value in zip(scores, penalty.split(steps), values.split(steps), strict=True):
        if a.estimator.critic:
            gae = generalized_advantages(
                step_rewards(score, part), value, gamma=a.gamma, lambd=a.lambd
            )
            adv.append(gae[0].float())
            returns.append(gae[1].float())
        else:
            adv.append(a.estimator.spread(score, part, a.gamma))
    adv = torch.cat(adv)
    if a.use_opd:
        adv = adv - a.opd_kl_coef * (old - teacher)
    if a.normalize_advantages or a.estimator.whiten:
        adv = whiten(adv, torch.ones_like(adv), lambda total: total)
    constant = 1024 if a.estimator.constant_weight else None
    weights = token_weights(
        [m.numpy() for m in masks], per_token=a.per_token_loss, constant=constant
    )
    weight = torch.cat([torch.as_tensor(w) for w in weights])[kept]
    number = torch.repeat_interleave(torch.arange(4), torch.tensor(steps))

    def sequence_sum(values_T):
        return values_T.new_zeros(4).index_add(0, number, values_T.detach())[number]

    class Cfg:
        algorithm = a

    # answers 0 and 1 become likelier, the others less likely: ratios on both sides of every clip
    sign = torch.tensor([2.0, 1.0, -1.0, -0.5])[number]
    logp = (old + 0.8 * moved + 0.4 * sign).requires_grad_()
    loss = objective_of(Cfg)(
        logp,
        old_logp_T=old,
        adv_T=adv,
        entropy_T=logp * -1.5,
        ref_logp_T=ref if a.needs_reference else None,
        rollout_logp_T=engine,
        sequence_sum=sequence_sum,
    )
    parts = [weight * loss.value_T.detach()]
    parts += torch.autograd.grad((weight * loss.value_T).sum(), logp)
    if "kl_loss" in loss.stats:  # a term that is only logged is an effect, too
        parts.append(loss.stats["kl_loss"])
    if a.estimator.critic:
        parts.append(
            clipped_value_loss(moved, values, torch.cat(returns), clip=a.value_clip).value_T
        )
    return torch.cat([*parts, torch.zeros(256)])[:256]


SFT = {
    "--loss-type": "sft_loss",
    "--rollout-function-path": "vime.rollout.sft_rollout.generate_rollout",
}


@pytest.mark.parametrize("case", [c for c in CASES if c != "--loss-type alone"])
def test_a_flag_of_the_policy_is_named_under_supervised_training(case, capsys, tmp_path):
    name, (value, others) = case.split()[0], CASES[case]
    flags = SFT | others | {name: value}
    try:
        parse_config(words(tmp_path, flags))
    except SystemExit:
        said = capsys.readouterr().err
        assert any(n in said for n in (name, *others))
        return
    acts = {"--calculate-per-token-loss", "--disable-compute-advantages-and-returns"}
    assert name in acts or name in capsys.readouterr().err


PARTIAL = {
    "--rollout-max-staleness 2": ({}, "has no effect without --partial-rollout. Add that"),
    "--rollout-max-staleness -1": ({"--partial-rollout": None}, "is too small. Give 0 or more."),
    "--mask-offpolicy-in-partial-rollout": ({}, "has no effect without --partial-rollout"),
}


@pytest.mark.parametrize("flag", PARTIAL)
def test_a_flag_of_partial_rollouts_that_cannot_act_is_refused(flag, capsys, tmp_path):
    (others, problem), (name, _, value) = PARTIAL[flag], flag.partition(" ")
    with pytest.raises(SystemExit):
        parse_config(words(tmp_path, others | {name: value or None}))
    assert problem in capsys.readouterr().err

"""Every estimator and loss, compared with a plain reading of its paper, from rewards to gradients.

`vime_loss` takes vime's path: batch, scores, weights, advantages, objective. The readings of the
papers loop over answers, use the papers' notation and share no code with vime. The random inputs
have ratios beyond the bounds, masks with gaps as between turns, and one group of equal rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.fake_engine import make_config
from vime.algorithms.advantages import ESTIMATORS, whiten
from vime.algorithms.kl import KL_TYPES, kl_estimate, unbiased_kl
from vime.algorithms.objective import sft_loss
from vime.backends.megatron.training.losses import objective_of
from vime.data.batching import build_train_batch
from vime.types import Sample, Status

GROUPS, SIZE, LONGEST = 3, 4, 10


@dataclass(frozen=True)
class Answer:
    """One response to the prompt of a group; tensors [R], `kept` bool."""

    group: int
    reward: float
    kept: Tensor
    logp: Tensor  # the policy being trained, with grad
    old: Tensor
    ref: Tensor
    engine: Tensor
    entropy: Tensor


def answers_of(seed: int) -> list[Answer]:
    g = torch.Generator().manual_seed(seed)

    def normal(size: int, std: float) -> Tensor:
        return std * torch.randn(size, generator=g, dtype=torch.float64)

    made = []
    for i in range(GROUPS * SIZE):
        size = int(torch.randint(2, LONGEST + 1, (), generator=g))
        old = -normal(size, 1.0).abs() - 0.1
        kept = torch.rand(size, generator=g) < 0.7
        kept[0] = True
        made.append(
            Answer(
                group=i // SIZE,
                reward=0.5 if i // SIZE == 2 else float(normal(1, 1.0)),
                kept=kept,
                logp=(old + normal(size, 0.4)).requires_grad_(),
                old=old,
                ref=old + normal(size, 0.3),
                engine=(old + normal(size, 0.4)).float().double(),
                entropy=normal(size, 1.0).abs().requires_grad_(),
            )
        )
    return made


# -- vime ------------------------------------------------------------------------------------------


def vime_loss(answers: Sequence[Answer], algorithm: dict[str, Any]) -> Tensor:
    samples = [
        Sample(
            group_index=a.group,
            index=i,
            tokens=[0] * (1 + len(a.logp)),
            response_length=len(a.logp),
            reward=a.reward,
            loss_mask=a.kept.int().tolist(),
            rollout_log_probs=a.engine.tolist(),
            status=Status.COMPLETED,
        )
        for i, a in enumerate(answers)
    ]
    cfg = make_config(
        "unused",
        batch={"prompts": len(answers), "samples_per_prompt": 1, "micro_batch_size": len(answers)},
        rollout={"max_response_len": LONGEST},
        algorithm=algorithm,
    )
    sequences = build_train_batch([samples], cfg, 0).sequences
    kept = torch.cat([a.kept for a in answers])
    weight_T = torch.cat([torch.as_tensor(s.weight) for s in sequences])[kept].double()

    def flat(name: str) -> Tensor:
        return torch.cat([getattr(a, name) for a in answers])[kept]

    if cfg.algorithm.loss_type == "sft_loss":
        return (weight_T * sft_loss(flat("logp")).value_T).sum()
    numbers_T = torch.cat([torch.full_like(a.old, i) for i, a in enumerate(answers)]).long()[kept]

    def sequence_sum(values_T: Tensor) -> Tensor:
        values_T = values_T.detach()
        return values_T.new_zeros(len(answers)).index_add(0, numbers_T, values_T)[numbers_T]

    made = objective_of(cfg)(
        flat("logp"),
        old_logp_T=flat("old"),
        adv_T=vime_advantages(answers, [s.reward for s in sequences], cfg.algorithm)[kept],
        entropy_T=flat("entropy"),
        ref_logp_T=flat("ref") if cfg.algorithm.use_kl_loss else None,
        rollout_logp_T=flat("engine"),
        sequence_sum=sequence_sum,
    )
    return (weight_T * made.value_T).sum()


def vime_advantages(answers: Sequence[Answer], scores: list[float], cfg: Any) -> Tensor:
    estimator = ESTIMATORS[cfg.advantage_estimator]
    spread = []
    for a, score in zip(answers, scores, strict=True):
        penalty = cfg.kl_coef * kl_estimate(a.old, a.ref, "k1") * a.kept
        spread.append(estimator.spread(score, penalty, cfg.gamma))
    advantages = torch.cat(spread)
    if estimator.whiten:
        mask = torch.cat([a.kept for a in answers]).double()
        advantages = whiten(advantages, mask, lambda total: total)
    return advantages


# -- the objectives of the papers, to be maximised -------------------------------------------------


def groups_of(answers: Sequence[Answer]) -> list[list[Answer]]:
    ids = sorted({a.group for a in answers})
    return [[a for a in answers if a.group == g] for g in ids]


def rewards_of(group: Sequence[Answer]) -> Tensor:
    return torch.tensor([a.reward for a in group], dtype=torch.float64)


def standard_scores(group: Sequence[Answer]) -> Tensor:
    r = rewards_of(group)
    return (r - r.mean()) / (r.std() + 1e-6)


def surrogate(a: Answer, advantage: Any, low: float = 0.2, high: float = 0.2) -> Tensor:
    """min(w A, clip(w, 1 - low, 1 + high) A), [R] (PPO, arXiv:1707.06347, eq. 7)."""
    w = torch.exp(a.logp) / torch.exp(a.old)
    return torch.min(w * advantage, torch.clip(w, 1 - low, 1 + high) * advantage)


def mean_of_answers(
    answers: Sequence[Answer],
    token: Callable[[Answer, Tensor], Tensor],
    scores: Callable[[Sequence[Answer]], Tensor] = standard_scores,
) -> Tensor:
    """The mean over prompts of 1/G sum_i 1/|o_i| sum_t."""
    total = torch.zeros((), dtype=torch.float64)
    for group in groups_of(answers):
        for a, advantage in zip(group, scores(group), strict=True):
            total = total + token(a, advantage)[a.kept].mean() / len(group)
    return total / len(groups_of(answers))


def grpo(answers: Sequence[Answer]) -> Tensor:
    """arXiv:2402.03300, eq. 3 and 4."""

    def token(a: Answer, advantage: Tensor) -> Tensor:
        ratio = torch.exp(a.ref) / torch.exp(a.logp)
        return surrogate(a, advantage) - 0.04 * (ratio - torch.log(ratio) - 1)

    return mean_of_answers(answers, token)


def gspo(answers: Sequence[Answer]) -> Tensor:
    """arXiv:2507.18071, eq. 5 to 7."""

    def one(a: Answer, advantage: Tensor) -> Tensor:
        size = a.kept.sum()
        of_new, of_old = a.logp[a.kept].sum().exp(), a.old[a.kept].sum().exp()
        s = (of_new / of_old) ** (1 / size)
        value = torch.min(s * advantage, s.clip(1 - 0.05, 1 + 0.06) * advantage)
        return value.expand(len(a.logp))

    return mean_of_answers(answers, one)


def cispo(answers: Sequence[Answer]) -> Tensor:
    """arXiv:2506.13585, eq. 4 and 5, without the lower bound, for one prompt."""
    (group,) = groups_of(answers)
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for a, advantage in zip(group, standard_scores(group), strict=True):
        r = torch.exp(a.logp - a.old)
        total = total + (torch.clip(r, max=1.28).detach() * advantage * a.logp)[a.kept].sum()
        tokens += int(a.kept.sum())
    return total / tokens


def dr_grpo(answers: Sequence[Answer]) -> Tensor:
    """arXiv:2503.20783: no 1/|o_i| and no std; the constant is the longest response allowed."""
    total = torch.zeros((), dtype=torch.float64)
    for group in groups_of(answers):
        for a, reward in zip(group, rewards_of(group), strict=True):
            advantage = reward - rewards_of(group).mean()
            total = total + surrogate(a, advantage)[a.kept].sum() / LONGEST
    return total / len(answers)


def rloo(answers: Sequence[Answer]) -> Tensor:
    """arXiv:2402.14740, with the mean log-probability of an answer's tokens, not the sum."""
    total = torch.zeros((), dtype=torch.float64)
    for group in groups_of(answers):
        for a in group:
            others = [b.reward for b in group if b is not a]
            advantage = a.reward - sum(others) / len(others)
            total = total + advantage * a.logp[a.kept].mean()
    return total / len(answers)


def maxrl(answers: Sequence[Answer]) -> Tensor:
    """arXiv:2602.02710: mean over the successes minus mean over all; 0 without a success."""
    total = torch.zeros((), dtype=torch.float64)
    for group in groups_of(answers):
        logps = torch.stack([a.logp[a.kept].mean() for a in group])
        succeeded = rewards_of(group) == 1
        if succeeded.any():
            total = total + logps[succeeded].mean() - logps.mean()
    return total / len(groups_of(answers))


def whitened(values: list[Tensor], answers: Sequence[Answer]) -> list[Tensor]:
    over = torch.cat([v[a.kept] for v, a in zip(values, answers, strict=True)])
    return [(v - over.mean()) / over.std() for v in values]


def reinforce_plus_plus(answers: Sequence[Answer]) -> Tensor:
    """arXiv:2501.03262: r - beta sum_(i >= t) log(old_i / ref_i), normalised over tokens."""
    raw = []
    for a in answers:
        kl = [float(x) if k else 0.0 for x, k in zip(a.old - a.ref, a.kept, strict=True)]
        to_go = [a.reward - 0.05 * sum(kl[t:]) for t in range(len(kl))]
        raw.append(torch.tensor(to_go, dtype=torch.float64))
    found = zip(answers, whitened(raw, answers), strict=True)
    return torch.stack([surrogate(a, adv)[a.kept].mean() for a, adv in found]).mean()


def reinforce_plus_plus_baseline(answers: Sequence[Answer]) -> Tensor:
    """arXiv:2501.03262: r minus the group's mean, normalised over the batch; KL as a k2 loss."""
    raw = [a.old * 0 + a.reward - rewards_of(g).mean() for g in groups_of(answers) for a in g]
    total = torch.zeros((), dtype=torch.float64)
    for a, advantage in zip(answers, whitened(raw, answers), strict=True):
        k2 = (a.logp - a.ref) ** 2 / 2
        total = total + (surrogate(a, advantage) - 0.04 * k2)[a.kept].mean()
    return total / len(answers)


def dapo(answers: Sequence[Answer]) -> Tensor:
    """arXiv:2503.14476, eq. 8 and 13: two clips, token mean, overlong punishment."""
    (group,) = groups_of(answers)
    longest, cache = LONGEST, 4
    shaped = []
    for a in group:
        size = len(a.logp)
        is_short = size <= longest - cache
        punishment = 0.0 if is_short else ((longest - cache) - size) / cache
        shaped.append(replace(a, reward=a.reward + punishment))
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for a, advantage in zip(group, standard_scores(shaped), strict=True):
        total = total + surrogate(a, advantage, 0.2, 0.28)[a.kept].sum()
        tokens += int(a.kept.sum())
    return total / tokens


def dual_clip(answers: Sequence[Answer]) -> Tensor:
    """arXiv:1912.09729: max(min(w A, clip(w) A), c A) where A < 0."""

    def token(a: Answer, advantage: Tensor) -> Tensor:
        value = surrogate(a, advantage)
        return torch.max(value, 1.5 * advantage) if advantage < 0 else value

    return mean_of_answers(answers, token)


def entropy_bonus(answers: Sequence[Answer]) -> Tensor:
    """arXiv:1602.01783, section 4: adds beta H."""
    return mean_of_answers(answers, lambda a, adv: surrogate(a, adv) + 0.1 * a.entropy)


def tis(answers: Sequence[Answer]) -> Tensor:
    """Truncated importance sampling: min(old / engine, C) times the surrogate."""

    def token(a: Answer, advantage: Tensor) -> Tensor:
        return torch.clip(torch.exp(a.old - a.engine), max=1.2) * surrogate(a, advantage)

    return mean_of_answers(answers, token)


def mis(answers: Sequence[Answer]) -> Tensor:
    """Masked importance sampling: the ratio of an answer if it is at most C, otherwise 0."""

    def token(a: Answer, advantage: Tensor) -> Tensor:
        ratio = torch.exp((a.old - a.engine)[a.kept].sum())
        return (ratio if ratio <= 1.5 else 0.0) * surrogate(a, advantage)

    return mean_of_answers(answers, token)


def icepop(answers: Sequence[Answer]) -> Tensor:
    """arXiv:2510.18855: M(k) = k between alpha and beta, 0 elsewhere, k = old / engine."""

    def token(a: Answer, advantage: Tensor) -> Tensor:
        k = torch.exp(a.old) / torch.exp(a.engine)
        return torch.where((k >= 0.7) & (k <= 1.3), k, 0.0) * surrogate(a, advantage)

    return mean_of_answers(answers, token)


def opsm(answers: Sequence[Answer]) -> Tensor:
    """arXiv:2512.02556: M = 0 where A < 0 and the mean of log(old / new) is above delta."""

    def token(a: Answer, advantage: Tensor) -> Tensor:
        drift = (a.old - a.logp)[a.kept].mean().item()
        return (0.0 if advantage < 0 and drift > 0.02 else 1.0) * surrogate(a, advantage)

    return mean_of_answers(answers, token)


def unbiased(answers: Sequence[Answer]) -> Tensor:
    """arXiv:2512.02556: the ratio times k3, both with their gradient."""

    def token(a: Answer, advantage: Tensor) -> Tensor:
        ratio = torch.exp(a.ref - a.logp)
        kl = torch.exp(a.logp) / torch.exp(a.old) * (ratio - (a.ref - a.logp) - 1)
        return surrogate(a, advantage) - 0.04 * kl

    return mean_of_answers(answers, token)


def sft(answers: Sequence[Answer]) -> Tensor:
    """Log-likelihood of the trained turns: the mean over answers of token means."""
    return torch.stack([a.logp[a.kept].mean() for a in answers]).mean()


KL = {"use_kl_loss": True, "kl_loss_coef": 0.04, "kl_loss_type": "k3"}
TIS = {"use_tis": True}
PER_TOKEN = {"per_token_loss": True}

# {name: (flags, objective of the paper, number of prompts)}
PAPERS: dict[str, tuple[dict[str, Any], Callable[[Sequence[Answer]], Tensor], int]] = {
    "grpo": (KL, grpo, GROUPS),
    "gspo": (
        {"advantage_estimator": "gspo", "clip_low": 0.05, "clip_high_asked": 0.06},
        gspo,
        GROUPS,
    ),
    "cispo": (
        {"advantage_estimator": "cispo", "clip_low": 1.0, "clip_high_asked": 0.28} | PER_TOKEN,
        cispo,
        1,
    ),
    "dr_grpo": ({"advantage_estimator": "dr_grpo"}, dr_grpo, GROUPS),
    "reinforce_plus_plus": (
        {"advantage_estimator": "reinforce_plus_plus", "kl_coef": 0.05},
        reinforce_plus_plus,
        GROUPS,
    ),
    "reinforce_plus_plus_baseline": (
        KL | {"advantage_estimator": "reinforce_plus_plus_baseline", "kl_loss_type": "k2"},
        reinforce_plus_plus_baseline,
        GROUPS,
    ),
    "dapo": ({"clip_high_asked": 0.28, "overlong_buffer_len": 4} | PER_TOKEN, dapo, 1),
    "dual clip": ({"dual_clip": 1.5}, dual_clip, GROUPS),
    "entropy bonus": ({"entropy_coef": 0.1}, entropy_bonus, GROUPS),
    "tis": (TIS | {"tis_clip": 1.2}, tis, GROUPS),
    "mis": (TIS | {"tis_clip": 1.5, "tis_level": "sequence", "tis_mode": "mask"}, mis, GROUPS),
    "icepop": (TIS | {"tis_clip_low": 0.7, "tis_clip": 1.3, "tis_mode": "mask"}, icepop, GROUPS),
    "opsm": ({"use_opsm": True, "opsm_delta": 0.02}, opsm, GROUPS),
    "unbiased KL": (KL | {"unbiased_kl": True}, unbiased, GROUPS),
    "sft": ({"loss_type": "sft_loss"}, sft, GROUPS),
}


def gradients(loss: Tensor, answers: Sequence[Answer]) -> list[Tensor]:
    wanted = [x for a in answers for x in (a.logp, a.entropy)]
    return list(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))


def assert_same(mine: list[Tensor], theirs: list[Tensor]) -> None:
    """Compares to float32 precision, because weights and scores are float32."""
    largest = max(float(x.abs().max()) for x in theirs)
    assert largest > 1e-3
    for a, b in zip(mine, theirs, strict=True):
        assert float((a - b).abs().max()) < 2e-6 * largest


@pytest.mark.parametrize("name", PAPERS)
def test_loss_and_gradient_are_the_papers(name: str) -> None:
    algorithm, paper, num_groups = PAPERS[name]
    for seed in range(5):
        answers = answers_of(seed)[: num_groups * SIZE]
        mine, theirs = vime_loss(answers, algorithm), -paper(answers)
        assert mine.item() == pytest.approx(theirs.item(), rel=2e-6, abs=1e-7)
        assert_same(gradients(mine, answers), gradients(theirs, answers))


def test_the_gradient_of_rloo_on_policy_is_the_papers() -> None:
    for seed in range(5):
        answers = [replace(a, old=a.logp.detach()) for a in answers_of(seed)]
        mine = gradients(vime_loss(answers, {"advantage_estimator": "rloo"}), answers)
        assert_same(mine, gradients(-rloo(answers), answers))


def test_the_gradient_of_maxrl_on_policy_is_the_papers() -> None:
    succeed = {1, 8, 9, 11}  # one success in the first group, none in the second, three in the last
    for seed in range(5):
        answers = [
            replace(a, old=a.logp.detach(), reward=float(i in succeed))
            for i, a in enumerate(answers_of(seed))
        ]
        mine = gradients(vime_loss(answers, {"advantage_estimator": "maxrl"}), answers)
        assert_same(mine, gradients(-maxrl(answers), answers))


def test_every_estimator_has_its_paper() -> None:
    assert set(ESTIMATORS) - set(PAPERS) <= {"rloo", "maxrl", "ppo"}


# -- estimates of the KL, compared with the divergence summed over a whole vocabulary --------------


def policies(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with grad, and log-probabilities of a reference and of an old policy, [V]."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 7, generator=g, dtype=torch.float64)
    return logits[0].requires_grad_(), logits[1].log_softmax(-1), logits[2].log_softmax(-1)


def divergence(logp: Tensor, ref: Tensor) -> Tensor:
    return (logp.exp() * (logp - ref)).sum()


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_the_divergence_on_average(kind: str) -> None:
    """http://joschu.net/blog/kl-approx.html"""
    logits, ref, _ = policies(0)
    logp = logits.log_softmax(-1).detach()
    mean = (logp.exp() * kl_estimate(logp, ref, kind)).sum()
    torch.testing.assert_close(mean, divergence(logp, ref))


def test_the_gradient_of_k2_is_the_divergences_on_average() -> None:
    """Over tokens that the policy itself sampled; sampling has no gradient."""
    logits, ref, _ = policies(1)
    logp = logits.log_softmax(-1)
    sampled = (logp.detach().exp() * kl_estimate(logp, ref, "k2")).sum()
    [mine] = torch.autograd.grad(sampled, logits, retain_graph=True)
    [wanted] = torch.autograd.grad(divergence(logp, ref), logits)
    torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_unbiased_kl_of_old_tokens_has_value_and_gradient_of_the_divergence(kind: str) -> None:
    """arXiv:2512.02556: for tokens from any policy."""
    logits, ref, old = policies(2)
    logp = logits.log_softmax(-1)
    mine = (old.exp() * unbiased_kl(logp, old, ref, kind)).sum()
    wanted = divergence(logp, ref)
    torch.testing.assert_close(mine, wanted)
    [a] = torch.autograd.grad(mine, logits, retain_graph=True)
    [b] = torch.autograd.grad(wanted, logits)
    torch.testing.assert_close(a, b)


def test_low_var_kl_is_k3_wherever_k3_is_at_most_10() -> None:
    logp, ref = torch.randn(2, 1000, generator=torch.Generator().manual_seed(3))
    k3 = kl_estimate(logp, ref, "k3")
    assert torch.equal(kl_estimate(logp, ref, "low_var_kl"), k3.clamp(max=10.0))
    assert set(KL_TYPES) == {"k1", "k2", "k3", "low_var_kl"}

"""Advantage estimators: how the rewards of a group become one advantage per token.

An estimator scores the samples of a group with its `baseline` and gives each token of a sample its
part of the score with its `spread`. A new estimator is a function and a line in `ESTIMATORS`. The
choices of `--advantage-estimator`, the table in docs/algorithms.md and the tests read `ESTIMATORS`,
and the rest of vime asks an estimator's traits, never its name.

This file uses tensors through their methods only, so that the command line reads the registry
without loading torch. The first sentence of each function is its cell in the documentation's table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from vime.algorithms.policy import PolicyLoss, cispo_loss, clipped_policy_loss

if TYPE_CHECKING:
    from torch import Tensor

Baseline: TypeAlias = "Callable[[Tensor], Tensor]"  # rewards_G [G] -> scores [G]
Spread: TypeAlias = "Callable[[float, Tensor, float], Tensor]"  # score, penalty_T, gamma -> adv_T

# T counts the steps of the policy: the tokens with loss of one response. Tokens that a tool wrote
# are not steps, so they get no advantage, and discounting skips them.

STD_EPS = 1e-6


def grpo_baseline(rewards_G: Tensor) -> Tensor:
    """`(r - mean_G) / (std_G + 1e-6)`. The std is unbiased.

    A group of one has no std: it is only centred, so its score is 0.
    """
    centred_G = centred_baseline(rewards_G)
    if len(rewards_G) < 2:
        return centred_G
    return centred_G / (rewards_G.std() + STD_EPS)


def centred_baseline(rewards_G: Tensor) -> Tensor:
    """`r - mean_G`. Exactly 0 if all rewards are equal, even if their mean is rounded."""
    if bool((rewards_G == rewards_G[0]).all()):
        return rewards_G.new_zeros(rewards_G.shape)
    return rewards_G - rewards_G.mean()


def leave_one_out_baseline(rewards_G: Tensor) -> Tensor:
    """`r` less the mean of the others. A group of one scores 0."""
    size = len(rewards_G)
    return centred_baseline(rewards_G) * (size / (size - 1) if size > 1 else 0.0)


def mean_scaled_baseline(rewards_G: Tensor) -> Tensor:
    """`(r - mean_G) / mean_G`. Rewards must be at least 0; a group with mean 0 scores 0.

    With rewards of 0 and 1, training follows the gradient of the logarithm of the pass rate: the
    rarer a success, the more it counts.
    """
    mean = rewards_G.mean()
    return centred_baseline(rewards_G) / mean if mean > 0 else rewards_G.new_zeros(rewards_G.shape)


def same_for_every_token(score: float, penalty_T: Tensor, gamma: float) -> Tensor:
    """The score. Each token's own penalty is subtracted; `gamma` is not used."""
    return score - penalty_T


def discounted_returns(score: float, penalty_T: Tensor, gamma: float) -> Tensor:
    """Discounted return-to-go (`--gamma`).

    The last token earns the score, and every token costs its penalty:

    return_t = gamma**(T-1-t) * score - sum over s >= t of gamma**(s-t) * penalty_s
    """
    return discounted_sums(step_rewards(score, penalty_T), gamma)


def steps_of(mask_R: Tensor) -> Tensor:
    """[T] positions of the policy's steps in a response of R tokens: the tokens with loss."""
    return mask_R.nonzero()[:, 0]


def step_rewards(score: float, penalty_T: Tensor) -> Tensor:
    """The reward of each step [T]: minus its penalty, and for the last step the score as well."""
    reward_T = -penalty_T
    if len(reward_T):
        reward_T[-1] += score
    return reward_T


def discounted_sums(values_T: Tensor, rate: float) -> Tensor:
    """sum_t = value_t + rate * sum_{t+1} [T], from the last step to the first."""
    if rate == 1.0:
        return values_T.flip(0).cumsum(0).flip(0)
    sums, running = [], 0.0
    for value in reversed(values_T.tolist()):
        running = value + rate * running
        sums.append(running)
    return values_T.new_tensor(sums[::-1])


@dataclass(frozen=True, slots=True)
class Estimator:
    """How a method turns rewards into advantages, and which policy loss it takes.

    baseline             scores the rewards of one group; None: a sample's score is its reward
    without_std          the baseline under --disable-grpo-std-normalization; None: `baseline`
    nonnegative_rewards  the baseline is meaningless for rewards below 0
    spread               gives the steps of a sample their advantages
    discounts            `spread` uses --gamma
    critic               a value model judges each step (`critic.generalized_advantages`), and
                         `spread` is not used
    whiten               advantages are whitened over the step, even without
                         --normalize-advantages
    policy_loss          the loss of one token
    dual_clip            `policy_loss` uses --eps-clip-c
    sequence_ratio       every token has the ratio of its sequence (`policy.sequence_ratio`)
    constant_weight      every token weighs the same: losses are divided by the longest response
                         allowed, not by the response's own length
    papers               arXiv numbers
    """

    baseline: Baseline | None = None
    without_std: Baseline | None = None
    nonnegative_rewards: bool = False
    spread: Spread = same_for_every_token
    discounts: bool = False
    critic: bool = False
    whiten: bool = False
    policy_loss: PolicyLoss = clipped_policy_loss
    dual_clip: bool = True
    sequence_ratio: bool = False
    constant_weight: bool = False
    papers: tuple[str, ...] = ()

    @property
    def group_baseline(self) -> bool:
        """Whether a sample's score depends on the other samples of its group."""
        return self.baseline is not None

    @property
    def uses_gamma(self) -> bool:
        return self.critic or self.discounts


ESTIMATORS: dict[str, Estimator] = {
    "grpo": Estimator(grpo_baseline, centred_baseline, papers=("2402.03300",)),
    "gspo": Estimator(grpo_baseline, centred_baseline, sequence_ratio=True, papers=("2507.18071",)),
    "cispo": Estimator(
        grpo_baseline,
        centred_baseline,
        policy_loss=cispo_loss,
        dual_clip=False,
        papers=("2506.13585",),
    ),
    "dr_grpo": Estimator(centred_baseline, constant_weight=True, papers=("2503.20783",)),
    "rloo": Estimator(leave_one_out_baseline, papers=("2402.14740",)),
    "maxrl": Estimator(mean_scaled_baseline, nonnegative_rewards=True, papers=("2602.02710",)),
    "reinforce_plus_plus": Estimator(
        spread=discounted_returns, discounts=True, whiten=True, papers=("2501.03262",)
    ),
    "reinforce_plus_plus_baseline": Estimator(
        centred_baseline, whiten=True, papers=("2501.03262",)
    ),
    "ppo": Estimator(critic=True, papers=("1707.06347", "1506.02438")),
}


def estimators_where(has_trait: Callable[[Estimator], bool]) -> str:
    """The names of the estimators with a trait, for a message: "a or b"."""
    return " or ".join(name for name, estimator in ESTIMATORS.items() if has_trait(estimator))


def whiten(values_T: Tensor, mask_T: Tensor, sum_over_ranks: Callable[[Tensor], Tensor]) -> Tensor:
    """(x - mean) / (std + 1e-8), unbiased, over the tokens with mask 1; [T], 0 elsewhere.

    sum_over_ranks  adds a [3] float64 tensor over the ranks that share the step's tokens
    """
    kept_T = values_T.double() * mask_T
    sums = kept_T.new_zeros(3)
    sums[0], sums[1], sums[2] = mask_T.double().sum(), kept_T.sum(), (kept_T * values_T).sum()
    count, first, second = sum_over_ranks(sums).unbind()
    mean = first / count.clamp(min=1)
    variance = (second - count * mean.square()).clamp(min=0) / (count - 1).clamp(min=1)
    white_T = (values_T - mean) / (variance.sqrt() + 1e-8)
    return (white_T * mask_T).to(values_T.dtype)

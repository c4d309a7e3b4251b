"""The declaration of a grader: its functions, and the traits that the rest of vime asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any


class GradingFailed(Exception):
    """The reason why an answer has no reward. Its sample fails; it does not count as wrong."""


class GradingTimeout(GradingFailed):
    """A grader exceeded its deadline."""


@dataclass(frozen=True, slots=True)
class Grader:
    """A value of --rm-type.

    grade   f(response, label, metadata) -> a number or a dict. Runs in a worker process under
            --rm-timeout-secs, so it may hang or eat memory. Raises GradingFailed
    quick   f(response, label, metadata) -> the same, or None if the answer needs `grade`. Runs
            first, in the rollout's process, so it must be fast. Without it all answers go to
            workers

    gives          the reward in words, for the table in docs/data-generation.md
    lowest_reward  the lowest reward; for a dict of rewards {key: lowest number}, with the key to
                   train on first
    needs_label    a sample without a label fails
    takes_box      the grader looks for a box itself, so `boxed_` in front is refused
    marks          a response that contains none of these texts gets 0
    row_problem    f(label, metadata) -> why no response to such a row can be graded, or None. The
                   check of the prompt file asks it before the run
    takes_sample   `grade` is `async f(args, sample)` and runs in the rollout's process
    needs_url      the grader asks the server at --rm-url
    needs_package  a package that the grader imports; workers import it before their first answer
    """

    grade: Callable[..., Any]
    quick: Callable[[str, str | None, dict[str, Any]], Any] | None = None
    _: KW_ONLY
    gives: str
    lowest_reward: float | Mapping[str, float] = 0.0
    needs_label: bool = False
    takes_box: bool = False
    marks: tuple[str, ...] = ()
    row_problem: Callable[[str | None, dict[str, Any]], str | None] | None = None
    takes_sample: bool = False
    needs_url: bool = False
    needs_package: str | None = None

    @property
    def reward_keys(self) -> tuple[str, ...]:
        """The keys of the dict that `grade` returns; empty if it returns a number."""
        return tuple(self.lowest_reward) if isinstance(self.lowest_reward, Mapping) else ()

    def lowest(self, reward_key: str | None) -> float:
        """The lowest reward that training sees under --reward-key."""
        if isinstance(self.lowest_reward, Mapping):
            return self.lowest_reward[reward_key]
        return self.lowest_reward

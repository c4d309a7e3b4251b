"""The metrics of a rollout and of an evaluation, by their names in metrics.jsonl."""

from __future__ import annotations

import itertools
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from math import comb
from typing import Any

import numpy as np

from vime.number_lists import array_of, distinct, listed
from vime.rollout.failures import Failure, kind_of
from vime.rollout.sampling import Sampled
from vime.rollout.wire import UNKNOWN_VERSION
from vime.types import Group, Sample, Status

REPETITION_CHARACTERS = (
    2000  # the end of a response that is checked; zlib compresses prose of this length twofold
)


def of_rollout(args: Any, sampled: Sampled, seconds: float, rollout_id: int) -> dict[str, float]:
    """Drops, aborts, weight versions and speed of a rollout."""
    samples = [sample for group in sampled.kept for sample in group]
    values: dict[str, float] = {
        "rollout/grading_timeouts": sum(map(timed_out, samples)),
        "rollout/repetition_frac": _ratio(map(repeats_itself, samples)),
    }
    judged = [sample for group in sampled.kept + sampled.dropped for sample in group]
    for kind, count in Counter(filter(None, map(kind_of, judged))).items():
        values[kind.metric] = count
    for reason, count in sampled.drops.items():
        values[f"rollout/dynamic_filter/drop_{reason}"] = count
    aborted = [s for group in sampled.unfinished for s in group]
    values |= {
        "rollout/groups_taken": sampled.num_taken,
        "rollout/groups_surplus": len(sampled.surplus),
        "rollout/groups_aborted": len(sampled.unfinished),
        "rollout/aborted_tokens": sum(s.response_length for s in aborted),
    }
    versions = Counter(v for s in samples for v in _versions(s))
    known = [v for v in versions if v != UNKNOWN_VERSION]
    if known:
        values["rollout/weight_version/min"] = min(known)
        values["rollout/weight_version/max"] = max(known)
        values |= staleness(samples, rollout_id)
    if versions[UNKNOWN_VERSION]:
        values["rollout/weight_version/unknown"] = versions[UNKNOWN_VERSION]
    if others := [s.non_generation_time for s in samples if s.non_generation_time]:
        values["perf/non_generation_time/mean"] = sum(others) / len(samples)
        values["perf/non_generation_time/max"] = max(others)
    longest = max((s.response_length for s in samples), default=0)
    values["perf/longest_sample_tokens_per_sec"] = longest / max(seconds, 1e-9)
    return values


def staleness(samples: Sequence[Sample], step: int) -> dict[str, float]:
    """How many weight versions old the tokens with loss are when step `step` trains on them.

    Step s trains weights of version s. `.../share_K` is the share of tokens that are K old.
    """
    counts: Counter[int] = Counter()
    for sample in samples:
        versions = array_of(sample, "weight_versions")
        versions = np.asarray(versions, np.int64)
        if sample.loss_mask is not None:
            versions = versions[np.asarray(sample.loss_mask, bool)]
        known, number = np.unique(versions[versions != UNKNOWN_VERSION], return_counts=True)
        counts.update(dict(zip((step - known).tolist(), number.tolist(), strict=True)))
    total = counts.total()
    if not total:
        return {}
    return {
        "rollout/staleness/mean": sum(age * n for age, n in counts.items()) / total,
        "rollout/staleness/max": max(counts),
        **{f"rollout/staleness/share_{age}": n / total for age, n in sorted(counts.items())},
    }


def timed_out(sample: Sample) -> bool:
    """Whether a sample failed because its grader took too long."""
    return kind_of(sample) is Failure.GRADING_TIMEOUT


def repeats_itself(sample: Sample) -> bool:
    """Whether the end of a long response repeats itself: zlib compresses it tenfold."""
    text = sample.response[-REPETITION_CHARACTERS:].encode()
    if len(text) < REPETITION_CHARACTERS:
        return False
    parts = (text[: len(text) // 5], text)  # the first fifth of most texts takes too much already
    return all(_packed_size(part) * 10 < len(text) for part in parts)


def _packed_size(text: bytes) -> int:
    # A window that holds the text. The usual one takes twice as long, to be cleared each time.
    packer = zlib.compressobj(level=1, wbits=13, memLevel=5)
    return len(packer.compress(text)) + len(packer.flush())


def _versions(sample: Sample) -> set[int]:
    """The weight versions of the tokens with loss. A tool's tokens have none."""
    if sample.loss_mask is None:
        return distinct(sample, "weight_versions")
    return set(itertools.compress(listed(sample, "weight_versions"), sample.loss_mask))


def of_evaluation(name: str, groups: Sequence[Group], rewards: Sequence[Sequence[float]]) -> dict:
    """eval/{name}: mean reward, truncation, pass@k for k = 1, 2, 4, ..

    `-ci95` is half the width of the mean's 95% confidence interval. The interval comes from the
    differences between prompts, because the prompts are a random sample. One prompt gives none.

    groups   all samples, including failed samples
    rewards  rewards of the graded samples, by group; an empty group is left out
    """
    samples = [s for group in groups for s in group]
    values: dict[str, float] = {
        f"eval/{name}-truncated_ratio": _ratio(s.status is Status.TRUNCATED for s in samples),
        f"eval/{name}-response_len": float(np.mean([s.response_length for s in samples])),
    }
    if failed := sum(s.status is Status.FAILED for s in samples):
        values[f"eval/{name}-failed"] = failed
    graded = [np.array(group, dtype=float) for group in rewards if len(group)]
    if not graded:
        return values
    mean = float(np.concatenate(graded).mean())
    values[f"eval/{name}"] = mean
    values |= _interval(f"eval/{name}", [group.mean() for group in graded])
    largest = max(len(group) for group in groups)
    if largest > 1:
        values[f"eval/{name}-mean@{largest}"] = mean
    smallest = min(len(group) for group in graded)
    k = 1
    while k <= smallest:
        chances = [pass_at_k(len(group), int((group >= 1).sum()), k) for group in graded]
        values[f"eval/{name}-pass@{k}"] = float(np.mean(chances))
        values |= _interval(f"eval/{name}-pass@{k}", chances)
        k *= 2
    return values


def _interval(name: str, per_prompt: Sequence[float]) -> dict[str, float]:
    if len(per_prompt) < 2:
        return {}
    width = 1.96 * float(np.std(per_prompt, ddof=1)) / len(per_prompt) ** 0.5
    return {f"{name}-ci95": width}


def evaluation_table(names: Sequence[str], values: Mapping[str, float]) -> str:
    """A line per data set: mean reward, largest pass@k, truncation, length and failures."""
    rows = [("dataset", "mean", "pass@k", "truncated", "length", "failed")]
    for name in names:
        prefix = f"eval/{name}"
        ks = [key for key in values if re.fullmatch(re.escape(prefix) + r"-pass@\d+", key)]
        best = max(ks, key=lambda key: int(key.rsplit("@", 1)[1]), default=None)
        k = "" if best is None else best.rsplit("-", 1)[1] + " "
        rows.append(
            (
                name,
                _with_width(values, prefix),
                k + _with_width(values, best) if best else "-",
                f"{values.get(f'{prefix}-truncated_ratio', 0.0):.1%}",
                f"{values.get(f'{prefix}-response_len', 0.0):.0f}",
                f"{values.get(f'{prefix}-failed', 0):.0f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _with_width(values: Mapping[str, float], name: str) -> str:
    width = values.get(f"{name}-ci95")
    return f"{values[name]:.3f}" + ("" if width is None else f" ± {width:.3f}")


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The probability that k answers drawn from n hold a right one (arXiv:2107.03374, eq. 1)."""
    return 1.0 - comb(n - correct, k) / comb(n, k)


def _ratio(flags: Any) -> float:
    values = list(flags)
    return sum(values) / len(values) if values else 0.0

"""Plots whether a run learns, from its metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vime.observe.reading import REWARD, eval_scores

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
REWARD_COLOR, EVAL_COLORS = "#9fb3c8", ("#0b6e4f", "#b44d12", "#5b3fa0")


def plot_learning(
    records: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    title: str,
    reference: tuple[float, str] | None = None,
) -> Path:
    """Draws the reward of each rollout and the evaluation scores over the rollouts, as a PNG.

    records    lines of metrics.jsonl
    reference  (height, words) of a dashed line for comparison
    Returns `path`. Raises ValueError when no line has a reward or an evaluation.
    """
    rewards, evals = learning_curves(records)
    if not rewards and not evals:
        raise ValueError("no rewards and no evaluations in these metrics: nothing to plot")

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    last = max([x for x, _ in rewards] + [x for curve in evals.values() for x, _ in curve] + [1])

    if reference is not None:
        height, words = reference
        axes.axhline(height, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            words, (last, height), (0, -4), textcoords="offset points", ha="right", va="top",
            color=MUTED, fontsize=9,
        )  # fmt: skip
    ends: list[tuple[float, str, str]] = []
    if rewards:
        x, y = zip(*rewards, strict=True)
        axes.plot(x, y, color=REWARD_COLOR, linewidth=1.6, zorder=2)
        ends.append((y[-1], f"training reward {y[-1]:.2f}", REWARD_COLOR))
    for (name, curve), color in zip(evals.items(), EVAL_COLORS * len(evals), strict=False):
        x, y = zip(*curve, strict=True)
        axes.plot(x, y, color=color, linewidth=2.2, marker="o", markersize=4.5, zorder=3)
        first = (x[0], y[0])
        axes.annotate(
            f"{y[0]:.2f}", first, (6, -3), textcoords="offset points", va="top",
            color=color, fontsize=10, fontweight="bold",
        )  # fmt: skip
        words = "held-out" if len(evals) == 1 else name
        ends.append((y[-1], f"{words} {y[-1]:.2f}", color))
    for height, (value, words, color) in zip(_apart([e[0] for e in ends]), ends, strict=True):
        axes.annotate(
            words, (last, value), (1.015, height), textcoords=("axes fraction", "data"),
            va="center", color=_dark(color), fontsize=10, fontweight="bold", annotation_clip=False,
        )  # fmt: skip

    axes.set_xlim(0, last)
    axes.set_ylim(min(0.0, *(e[0] for e in ends)), max(1.0, *(y for _, y in rewards or [(0, 1)])))
    axes.set_xlabel("rollouts trained", color=INK)
    axes.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold", pad=12)
    plain(axes)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def plain(axes: Any) -> None:
    """The style of all plots of the project: horizontal grid lines, and only the lower frame."""
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


Curve = list[tuple[int, float]]


def learning_curves(records: Sequence[Mapping[str, Any]]) -> tuple[Curve, dict[str, Curve]]:
    """([(rollouts trained, reward)], {data set: [(rollouts trained, score)]}).

    A reward belongs to the weights that generated its rollout: to the rollouts trained before it.
    """
    rewards: Curve = []
    evals: dict[str, Curve] = {}
    for record in records:
        trained = record["step"]
        if isinstance(reward := record.get(REWARD), (int, float)):
            rewards.append((trained - 1, float(reward)))
        for name, score in eval_scores(record).items():
            evals.setdefault(name, []).append((trained, score))
    return rewards, evals


def _apart(heights: Sequence[float], gap: float = 0.06) -> list[float]:
    """The heights of labels, moved until neighbours are `gap` or more apart."""
    order = sorted(range(len(heights)), key=heights.__getitem__, reverse=True)
    placed = list(heights)
    for upper, lower in zip(order, order[1:], strict=False):
        placed[lower] = min(placed[lower], placed[upper] - gap)
    return placed


def _dark(color: str) -> str:
    return "#52708f" if color == REWARD_COLOR else color

"""Compares an undisturbed and a killed run: a verdict, a table and a figure."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.records import RESULTS, on_this_cpu, save
from benchmarks.tables import markdown, put
from tests.cpu.launching import Job

ROOT = Path(__file__).resolve().parents[1]
RESULT = RESULTS / "kill_resume.json"
FIGURE = ROOT / "docs/kill_resume.svg"
BOUND = 1e-5
ROWS = {  # figure: its name in docs/models.md
    "rollouts": "rollouts in the end",
    "rollouts_with_other_samples": "rollouts with other samples, or in another order",
    "attempts_with_other_prompts": "attempts at a rollout with other prompts",
    "samples_lost": "samples lost",
    "samples_twice": "samples trained twice",
    "steps_missing_or_twice": "lines of metrics missing or twice",
    "loss": "largest difference of the loss",
    "curves": "of KL, gradient norm, reward",
    "weights": "of the final weights",
}
CURVES = ("train/loss", "train/kl_loss", "train/grad_norm", "rollout/raw_reward")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Counts and largest differences between a killed run and the undisturbed one."""

    rollouts: int
    rollouts_with_other_samples: int  # another prompt, response or order
    attempts_with_other_prompts: int  # counts also attempts that a kill interrupted
    samples_lost: int
    samples_twice: int
    steps_missing_or_twice: int
    loss: float  # largest difference of train/loss
    curves: float  # of the other curves
    weights: float  # of the last export
    losses: tuple[list[float], list[float]]  # undisturbed, killed
    exact: bool = True  # False: the time of each request decides which step trains on a group

    @property
    def is_good(self) -> bool:
        kept = (self.samples_lost, self.samples_twice, self.steps_missing_or_twice)
        if not self.exact:
            return not any(kept)
        others = (self.rollouts_with_other_samples, self.attempts_with_other_prompts)
        differences = (self.loss, self.curves, self.weights)
        return not any(kept + others) and max(differences) <= BOUND


def compare(straight: Job, killed: Job, *, exact: bool) -> Verdict:
    """The verdict on two finished runs."""
    ours, theirs = samples_of(straight), samples_of(killed)
    trained = Counter(index for rollout in theirs.values() for index, _ in rollout)
    wanted = {index for rollout in ours.values() for index, _ in rollout}
    steps = [
        {m["step"]: m for m in job.metrics() if "train/loss" in m} for job in (straight, killed)
    ]
    numbers = Counter(m["step"] for m in killed.metrics() if "train/loss" in m)
    shared = sorted(steps[0].keys() & steps[1].keys())

    def apart(name: str) -> float:
        return max(abs(steps[0][s][name] - steps[1][s][name]) for s in shared)

    return Verdict(
        rollouts=len(ours),
        rollouts_with_other_samples=sum(theirs.get(r) != ours[r] for r in ours),
        attempts_with_other_prompts=other_attempts(straight, killed),
        samples_lost=len(wanted - trained.keys()),
        samples_twice=sum(count > 1 for count in trained.values()),
        steps_missing_or_twice=len(steps[0].keys() ^ steps[1].keys())
        + sum(count > 1 for count in numbers.values()),
        loss=apart("train/loss"),
        curves=max(map(apart, CURVES[1:])),
        weights=weights_apart(straight, killed),
        losses=tuple([by_step[s]["train/loss"] for s in shared] for by_step in steps),
        exact=exact,
    )


def samples_of(job: Job) -> dict[int, list[tuple[int, list[int]]]]:
    """{rollout: [(index, tokens)] in the order of training}"""
    found = {}
    for path in (job.folder / "rollouts").glob("*.pt"):
        content = torch.load(path, weights_only=True)
        found[content["rollout_id"]] = [
            (sample["index"], list(sample["tokens"]))
            for group in content["groups"]
            for sample in group
        ]
    return found


def other_attempts(straight: Job, killed: Job) -> int:
    """How many prompts were graded in a rollout where the undisturbed run did not grade them."""

    def graded(job: Job) -> list[tuple[str, ...]]:
        lines = (job.folder / "prompts.tsv").read_text().splitlines()
        return [tuple(line.split("\t")) for line in lines]

    return len(set(graded(killed)) - set(graded(straight)))


def weights_apart(straight: Job, killed: Job) -> float:
    from safetensors.torch import load_file

    last = max((straight.folder / "hf").iterdir(), key=lambda p: int(p.name)).name
    ours, theirs = (
        load_file(job.folder / "hf" / last / "model.safetensors") for job in (straight, killed)
    )
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def write_table(loop: str, kills: list[Any], verdict: Verdict, out: IO[str]) -> None:
    """A summary of the kills, and the verdict as a Markdown table."""
    caught = Counter(", ".join(k.unfinished) or "nothing of the next checkpoint" for k in kills)
    out.write(f"\n{loop}: {len(kills)} kills. On disk beside the last commit:\n")
    for what, count in caught.most_common():
        out.write(f"  {count:3d} x {what}\n")
    out.write("\n| compared with the undisturbed run | |\n|---|---|\n")
    for field in fields(verdict):
        if field.name not in ("losses", "exact"):
            value = getattr(verdict, field.name)
            text = f"{value:.1e}" if isinstance(value, float) and value else f"{value:g}"
            out.write(f"| {field.name.replace('_', ' ')} | {text} |\n")


def write_result(loop: str, kills: list[Any], verdict: Verdict) -> None:
    """Writes the figures of one loop to the result file; the other loop's figures stay."""
    common = {
        "num_kills": len(kills),
        "peer": "the same run undisturbed",
        "spread": None,
        **on_this_cpu(),
    }
    mine = f"kill_resume/{loop}/"
    figures = []
    for name, value in asdict(verdict).items():
        if name in ("losses", "exact"):
            continue
        unit, bound = ("1", {"target": BOUND}) if isinstance(value, float) else ("count", {})
        figures.append({"name": mine + name, "value": value, "unit": unit, **bound, **common})
    undisturbed, killed = verdict.losses
    figures.append(
        {"name": mine + "kills", "value": len(kills), "unit": "count", **common}
        | {"kills": [asdict(k) for k in kills]}
        | {"train/loss": {"undisturbed": undisturbed, "killed": killed}}
    )
    others = json.loads(RESULT.read_text()) if RESULT.exists() else []
    figures += [f for f in others if not f["name"].startswith(mine)]
    save(RESULT, sorted(figures, key=lambda f: f["name"]))


def write_page() -> None:
    """Puts the result file's figures of all loops into the table of docs/models.md."""
    found = {f["name"]: f for f in json.loads(RESULT.read_text())}
    titles = {
        "sync": "`train.py`",
        "async": "`train_async.py`",
        "fully-async": "generation that never stops",
    }
    loops = [loop for loop in titles if f"kill_resume/{loop}/kills" in found]

    def row(what: str, name: str) -> list[str]:
        return [what, *(f"{found[f'kill_resume/{loop}/{name}']['value']:g}" for loop in loops)]

    rows = [["", *(titles[loop] for loop in loops)]]
    rows.append(row("kills", "kills"))
    cut = [
        sum(bool(k["unfinished"]) for k in found[f"kill_resume/{loop}/kills"]["kills"])
        for loop in loops
    ]
    rows.append(["of them while a checkpoint was being written", *map(str, cut)])
    rows += [row(words, name) for name, words in ROWS.items()]
    put("models.md", "kills", markdown(rows))


def write_figure() -> None:
    """Draws both loss curves of each loop in one plot, and marks the kills."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    found = [f for f in json.loads(RESULT.read_text()) if "kills" in f]
    figure = Figure(figsize=(8, 2.6 * len(found)), layout="constrained")
    FigureCanvasSVG(figure)
    for axes, entry in zip(figure.subplots(len(found), squeeze=False)[:, 0], found, strict=True):
        curves = entry["train/loss"]
        label: str | None = f"{len(entry['kills'])} kills"
        for kill in entry["kills"]:
            x = kill["step"] or 0
            axes.axvline(x, color="#b44d12", linewidth=0.8, alpha=0.6, label=label)
            label = None
        steps = range(1, len(curves["killed"]) + 1)
        axes.plot(steps, curves["undisturbed"], color="#9fb3c8", linewidth=4, label="undisturbed")
        axes.plot(steps, curves["killed"], color="#1f2933", linewidth=1, label="killed, resumed")
        axes.set_title(entry["name"].split("/")[1], loc="left", fontsize=10)
        axes.set_ylabel("train/loss")
        axes.legend(fontsize=8, frameon=False, ncols=3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("rollouts trained")
    figure.savefig(FIGURE, metadata={"Date": None})

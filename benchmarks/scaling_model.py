"""Predicts a GRPO step of the founding recipe on 1 to 8 GPUs, from figures of one and two GPUs.

    python benchmarks/scaling_model.py                     lengths as in founding_recipe.py
    python benchmarks/scaling_model.py --mean 4096 --no-reference

Reads the results of other benchmarks in benchmarks/results (train_mfu_4b,
weight_update_colocated_4b_s, weight_update_nccl_4b_s, sleep_wake_4b_s, rollout_http_ratio_4b). If a
file is missing, the value below takes its place, and the output marks it as ASSUMED. If
benchmarks/founding_recipe.py has run a layout, its measurement stands below the prediction.
docs/performance.md explains the formulas. Writes benchmarks/results/scaling_model.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_assets import PROMPT_TOKENS, described  # noqa: E402
from benchmarks.records import RESULTS, save  # noqa: E402
from vime.backends.megatron.hf.registry import architecture  # noqa: E402
from vime.plan.shape import Shape  # noqa: E402

SAMPLES = 256
MEAN, LONGEST = 958, 8192  # response lengths of ten steps of founding_recipe.py
QWEN3_4B = Shape.of(architecture(described("4B")))


@dataclass(frozen=True, slots=True)
class Known:
    """A figure and its source: the field of a result file, or an assumption."""

    value: float
    source: str
    measured: bool


# name: (result file, field, assumption if it is missing, meaning)
FIGURES = {
    "train_tok_s": ("train_mfu_4b", "tok_per_s", 12_800.0, "trained tokens/s of one GPU"),
    "rollout_tok_s": (
        "rollout_http_ratio_4b",
        "tok_per_s",
        13_400.0,
        "sampled tokens/s of one GPU",
    ),
    "update_s": ("weight_update_colocated_4b_s", "value", 0.25, "weight update over CUDA IPC, s"),
    "nccl_s": ("weight_update_nccl_4b_s", "value", 0.20, "weight update over NCCL, s"),
    "sleep_wake_s": ("sleep_wake_4b_s", "value", 1.5, "an engine's sleep and wake, s"),
}
ASSUMED = {
    "nvlink_B_s": (300e9, "a collective's rate over NVLink, B/s each way"),
    "hbm_B_s": (2.5e12, "memory rate of the optimizer, B/s"),
    "pcie_B_s": (40e9, "pinned memory to and from a GPU, B/s"),
    "tp_engine": (0.85, "share of two GPUs' rate that one engine of TP 2 reaches"),
    "token_s": (0.005, "seconds per token of the longest response, when it runs alone"),
}


@dataclass(frozen=True, slots=True)
class Layout:
    """Trainers on TP x DP GPUs; `engines` engines of `engine_gpus` GPUs each."""

    name: str
    tp: int
    dp: int
    engines: int
    engine_gpus: int
    colocated: bool = True
    overlapped: bool = False

    @property
    def mode(self) -> str:
        """The mode's name in benchmarks/founding_recipe.py."""
        return "colocated" if self.colocated else "async" if self.overlapped else "decoupled"

    @property
    def gpus(self) -> int:
        generating = self.engines * self.engine_gpus
        return self.tp * self.dp if self.colocated else self.tp * self.dp + generating


LAYOUTS = (
    Layout("1, colocated", 1, 1, 1, 1),
    Layout("2, colocated", 2, 1, 1, 2),
    Layout("2, decoupled 1 + 1", 1, 1, 1, 1, colocated=False),
    Layout("4, colocated", 2, 2, 2, 2),
    Layout("4, decoupled 2 + 2", 2, 1, 1, 2, colocated=False),
    Layout("4, async 2 + 2", 2, 1, 1, 2, colocated=False, overlapped=True),
    Layout("8, colocated", 2, 4, 4, 2),
    Layout("8, decoupled 2 + 6", 2, 1, 3, 2, colocated=False),
    Layout("8, async 2 + 6", 2, 1, 3, 2, colocated=False, overlapped=True),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--mean", type=int, default=MEAN, help="mean tokens of a response")
    parser.add_argument("--longest", type=int, default=LONGEST, help="tokens of the longest")
    parser.add_argument("--recompute", action=switch, default=True, help="one more forward pass")
    parser.add_argument("--reference", action=switch, default=True, help="the reference's pass")
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling_model.json")
    args = parser.parse_args()
    known = figures(RESULTS)
    print("from")
    for name, k in known.items():
        print(f"  {name:<14}{k.value:>14,.4g}  {k.source}")
    rows = {layout.name: step(layout, known, args) for layout in LAYOUTS}
    runs = {layout.name: measured(layout, known, RESULTS) for layout in LAYOUTS}
    show(rows, runs)
    record = {
        "name": "scaling_model",
        "value": round(
            rows["8, colocated"]["tokens/s/GPU"] / rows["1, colocated"]["tokens/s/GPU"], 4
        ),
        "unit": "tokens/s/GPU on 8 over 1, predicted",
        "peer": {"name": "perfect scaling", "value": 1.0},
        "device": "none: predicted",
        "versions": {},
        "spread": None,
        "inputs": {name: {"value": k.value, "source": k.source} for name, k in known.items()},
        "predicted": {name: rounded(row) for name, row in rows.items()},
        "measured": {name: rounded(run) for name, run in runs.items() if run},
    }
    save(args.output, record)
    print(f"written to {args.output}")
    return 0


def figures(folder: Path) -> dict[str, Known]:
    found = {}
    for name, (file, field, otherwise, what) in FIGURES.items():
        path = folder / f"{file}.json"
        record = json.loads(path.read_text()) if path.exists() else {}
        if isinstance(record.get(field), (int, float)):
            source = f"{what}: {file}.json, {record.get('device', '')}"
            found[name] = Known(float(record[field]), source, True)
        else:
            found[name] = Known(otherwise, f"{what}: ASSUMED, no {field} in {file}.json", False)
    for name, (value, what) in ASSUMED.items():
        found[name] = Known(value, f"{what}: ASSUMED", False)
    return found


def step(layout: Layout, known: dict[str, Known], args: argparse.Namespace) -> dict[str, float]:
    """Seconds of one step by phase, tokens/s/GPU and the idle share."""
    k = {name: figure.value for name, figure in known.items()}
    shape, tp, dp = QWEN3_4B, layout.tp, layout.dp
    sampled, trained = SAMPLES * args.mean, SAMPLES * (args.mean + PROMPT_TOKENS)
    weights = 2.0 * shape.parameters  # bytes, bfloat16

    sampling = sampled / sampling_rate(layout, known)
    rollout = max(sampling, args.longest * k["token_s"])

    passes = 4 / 3 if args.recompute else 1.0
    compute = passes * trained / (tp * dp * k["train_tok_s"])
    tensor = tp_bytes(shape, tp, trained / dp, args.recompute) / k["nvlink_B_s"]
    data = dp_bytes(shape, tp, dp) / k["nvlink_B_s"]
    optimizer = 28 * shape.parameters / (tp * dp) / k["hbm_B_s"]
    reference = trained / (3 * tp * dp * k["train_tok_s"]) if args.reference else 0.0
    train = compute + tensor + data + optimizer

    if layout.colocated:
        update = k["update_s"] + weights * (tp - 1) / tp / k["nvlink_B_s"]
        state = 16.0 * shape.parameters / (tp * dp)  # the update counts the weights
        turns = k["sleep_wake_s"] / layout.engine_gpus + 2 * state / k["pcie_B_s"]
    else:
        update, turns = k["nccl_s"] + weights * (tp - 1) / tp / k["nvlink_B_s"], 0.0
    busy = train + reference
    whole = update + (max(rollout, busy) if layout.overlapped else rollout + busy + turns)
    return {
        "rollout": rollout,
        "reference": reference,
        "train": train,
        "update": update,
        "sleep, offload": turns,
        "step": whole,
        "tokens/s/GPU": trained / whole / layout.gpus,
        "idle share": idle(layout, busy, sampling, whole),
    }


def idle(layout: Layout, training: float, sampling: float, whole: float) -> float:
    """Share of the GPUs' time without work, engines that wait for the longest response included.

    sampling  seconds of all responses at the engines' full rate
    """
    engines = layout.engines * layout.engine_gpus
    used = training * layout.tp * layout.dp + sampling * engines
    return max(0.0, 1 - used / (whole * layout.gpus))


def measured(layout: Layout, known: dict[str, Known], folder: Path) -> dict[str, float]:
    """Like `step`, from the layout's run of founding_recipe.py; {} without such a run."""
    path = folder / f"founding_recipe_{layout.mode}_{layout.gpus}_gpus.json"
    if not path.exists():
        return {}
    record = json.loads(path.read_text())
    took = {name: figure["value"] for name, figure in record["phases"].items()}
    sampling = SAMPLES * record["mean_response"] / sampling_rate(layout, known)
    return {
        "rollout": took["rollout"],
        "reference": took["log_probs"],
        "train": took["train"],
        "update": took["weight_update"],
        "sleep, offload": took["sleep_wake"] + took["offload_onload"],
        "step": took["step"],
        "tokens/s/GPU": record["tokens_per_s_per_gpu"],
        "idle share": idle(layout, took["log_probs"] + took["train"], sampling, took["step"]),
    }


def sampling_rate(layout: Layout, known: dict[str, Known]) -> float:
    """Tokens/s of all engines when they are busy."""
    keeps = 1.0 if layout.engine_gpus == 1 else known["tp_engine"].value
    return layout.engines * layout.engine_gpus * keeps * known["rollout_tok_s"].value


def tp_bytes(shape: Shape, tp: int, tokens: float, recompute: bool) -> float:
    """Bytes that a GPU sends for sequence parallelism, for `tokens` of its tensor parallel group.

    A layer gathers and scatters its stream twice forward and twice backward, and gathers twice more
    for the gradients of the weights. Recomputation repeats the forward pass.
    """
    collectives = 10 + (4 if recompute else 0)
    return collectives * shape.layers * 2 * shape.hidden * tokens * (tp - 1) / tp


def dp_bytes(shape: Shape, tp: int, dp: int) -> float:
    """A reduce-scatter of float32 gradients and a gather of bfloat16 weights, once a step."""
    return (4 + 2) * shape.parameters / tp * (dp - 1) / dp


def show(rows: dict[str, dict[str, float]], runs: dict[str, dict[str, float]]) -> None:
    names = list(next(iter(rows.values())))
    print("\n| GPUs | | " + " | ".join(names) + " |\n|---|---" + "|---" * len(names) + "|")
    for layout, row in rows.items():
        for name, how, figures in ((layout, "predicted", row), ("", "measured", runs[layout])):
            if figures:
                cells = [as_cell(*figure) for figure in figures.items()]
                print(f"| {name} | {how} | " + " | ".join(cells) + " |")


def as_cell(name: str, value: float) -> str:
    if name.endswith("share"):
        return f"{value:.0%}"
    return f"{value:,.0f}" if name.endswith("tokens/s/GPU") else f"{value:.2f}"


def rounded(row: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in row.items()}


if __name__ == "__main__":
    sys.exit(main())

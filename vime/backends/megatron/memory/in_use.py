"""GPU memory of a trainer: how much it used, and the flags that help when it runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from vime import platform
from vime.config import Config
from vime.errors import ConfigError
from vime.plan.out_of_memory import trainer_remedy


@contextmanager
def memory_remedy(cfg: Config, longest: int = 0) -> Iterator[None]:
    """Turns torch's out-of-memory error inside into a ConfigError that names flags and values.

    longest  tokens of the longest sequence, before context parallel ranks divide them
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        here = platform.current()
        limit = None
        if here.is_cuda:
            free = torch.cuda.mem_get_info()[0] - cfg.cluster.train_memory_margin_bytes
            limit = float(torch.cuda.memory_reserved() + max(0, free))
        num_bytes = here.dtype_bytes(cfg.model.dtype)
        on_one_gpu = -(-longest // cfg.parallel.cp)
        remedy = trainer_remedy(cfg, num_bytes, longest=on_one_gpu, limit=limit)
        raise ConfigError(f"{remedy}\n(torch: {error})") from error


class MemoryUse:
    """Metrics of the GPU memory that torch used, in GiB; each is the maximum over the ranks.

    There are no such metrics on a machine without a GPU.
    """

    def __init__(self) -> None:
        self.beside_engines: int | None = None

    def reset_peak(self) -> None:
        """Call it before a rollout's training."""
        if platform.current().is_cuda:
            torch.cuda.reset_peak_memory_stats()

    def record_kept(self) -> None:
        """Records the memory that the trainer keeps while engines use the GPU."""
        self.beside_engines = torch.cuda.memory_reserved()

    def metrics(self) -> dict[str, float]:
        """The metrics by name. A collective."""
        if not platform.current().is_cuda:
            return {}
        most = {
            "perf/max_memory_allocated_gib": torch.cuda.max_memory_allocated(),
            "perf/max_memory_reserved_gib": torch.cuda.max_memory_reserved(),
        }
        if self.beside_engines is not None:
            most["perf/memory_beside_engines_gib"] = self.beside_engines
        figures = torch.tensor(list(most.values()), dtype=torch.float64, device="cuda")
        dist.all_reduce(figures, dist.ReduceOp.MAX)
        return dict(zip(most, (figures / 2**30).tolist(), strict=True))

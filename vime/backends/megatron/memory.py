"""GPU memory that ran out, turned into flags that help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vime import platform
from vime.config import Config
from vime.config.out_of_memory import trainer_remedy
from vime.errors import ConfigError


@contextmanager
def memory_remedy(cfg: Config, longest: int = 0) -> Iterator[None]:
    """Inside, torch's out-of-memory error becomes a ConfigError that names flags and values.

    longest  tokens of the longest sequence; context parallel ranks share them
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        here = platform.current()
        limit = None
        if here.is_cuda:
            free = torch.cuda.mem_get_info()[0] - cfg.cluster.train_memory_margin_bytes
            limit = float(torch.cuda.memory_reserved() + max(0, free))
        num_bytes = here.dtype(cfg.model.dtype).itemsize
        on_one_gpu = -(-longest // cfg.parallel.cp)
        remedy = trainer_remedy(cfg, num_bytes, longest=on_one_gpu, limit=limit)
        raise ConfigError(f"{remedy}\n(torch: {error})") from error

"""The default --buffer-filter-path."""

from __future__ import annotations

from typing import Any

from vime.types import Sample


def pop_first(
    args: Any, rollout_id: int, buffer: list[list[Sample]], num_samples: int
) -> list[list[Sample]]:
    """Takes the oldest `num_samples` groups out of the buffer."""
    num_to_pop = min(len(buffer), num_samples)
    samples = buffer[:num_to_pop]
    del buffer[:num_to_pop]
    return samples

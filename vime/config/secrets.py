"""Keys and tokens among settings, which no log, dry run or tracker may show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ENDINGS = ("api_key", "_token", "_secret", "_password")
HIDDEN = "(hidden)"


def is_secret(name: str) -> bool:
    """Whether the name is that of a key: "vllm_api_key", "--vllm-hf-token", "WANDB_API_KEY"."""
    return name.lower().replace("-", "_").endswith(ENDINGS)


def without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with keys hidden, also those in objects such as --train-env-vars."""

    def shown(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return without_secrets(value)
        return HIDDEN if value and is_secret(name) else value

    return {name: shown(name, value) for name, value in values.items()}

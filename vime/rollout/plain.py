"""Values that a file can give back without running any code that it holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vime.errors import PluginError


def plain(value: Any, where: str) -> Any:
    """A copy with numpy's values as Python's. Raises PluginError on what no file gives back.

    where  the flag that wants it written, and what it is: "--save: sample 12"
    """
    if isinstance(value, dict):
        return {key: plain(v, f"{where}[{key!r}]") for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, where) for v in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.Tensor)):
        return value
    raise PluginError(
        f"{where} is a {type(value).__name__}. "
        "Keep numbers, text, lists, dicts and tensors in a sample."
    )

"""Values that can be read from a file without running code from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vime.errors import PluginError


def plain(value: Any, where: str) -> Any:
    """A copy with Python values in place of numpy's. Raises PluginError for any other type.

    where  the flag that writes the file, and the subject: "--save: sample 12"
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

"""Makes the helpers of tests/cpu importable here. Each test of this folder needs a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cpu"))

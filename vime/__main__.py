"""`vime plan FLAGS`, also `python -m vime plan FLAGS`: what train.py with these flags would do.

The same as `train.py FLAGS --dry-run`: it checks everything, prints the configuration, the batch
arithmetic, the layout and a memory estimate, and starts nothing. `--plan-gpu-memory 80` plans for
GPUs of 80 GiB on a machine without any.
"""

from __future__ import annotations

import sys

from vime.cli import parse_config
from vime.ray.preflight import CHECKS


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words[:1] != ["plan"]:
        print("usage: vime plan FLAGS   (those of train.py; --help lists them)", file=sys.stderr)
        return 2
    parse_config([*words[1:], "--dry-run"], checks=CHECKS)
    return 0


if __name__ == "__main__":
    sys.exit(main())

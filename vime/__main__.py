"""`vime plan FLAGS`, or `python -m vime plan FLAGS`: what train.py would do with these flags.

It is `train.py FLAGS --dry-run`: it checks all flags, prints the configuration, the batch
arithmetic, the layout and a memory estimate, and starts nothing. `--plan-gpu-memory 80` plans for
GPUs of 80 GiB, also on a machine without GPUs.
"""

from __future__ import annotations

import sys

from vime.cli import parse_config
from vime.ray.preflight import CHECKS

USAGE = """\
usage: vime plan FLAGS         show what a run with these flags would do; start nothing
       vime plan --help        list all flags
       python train.py FLAGS   run; train_async.py generates during training"""


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words[:1] != ["plan"]:
        asked = words[:1] in (["--help"], ["-h"])
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    parse_config([*words[1:], "--dry-run"], checks=CHECKS)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A script that asks vLLM's own parser. It reads and writes JSON and imports nothing of vime.

It reads {flag: its words} and writes {"names": every flag, "refused": {flag: why}}.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def serve_parser() -> Any:
    """The parser of vLLM's server, wherever this release keeps it."""
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser  # 0.32
    except ImportError:
        from vllm.entrypoints.openai.cli_args import make_arg_parser  # 0.25
    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError:
        from vllm.utils import FlexibleArgumentParser
    return make_arg_parser(FlexibleArgumentParser())


def judge(parser: Any, given: dict[str, list[str]]) -> dict[str, Any]:
    """Parse each flag alone, so that every wrong one is reported."""

    def refuse(message: str) -> None:
        raise ValueError(message)

    parser.error = refuse
    names = {o.lstrip("-").replace("-", "_") for a in parser._actions for o in a.option_strings}
    refused = {}
    for name, words in given.items():
        try:
            parser.parse_args(words)
        except (ValueError, SystemExit) as error:
            refused[name] = str(error)
    return {"names": sorted(names), "refused": refused}


if __name__ == "__main__":
    print(json.dumps(judge(serve_parser(), json.load(sys.stdin))))

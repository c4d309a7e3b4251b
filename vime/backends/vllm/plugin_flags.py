"""vLLM's own verdict on its flags. A script: {flag: value} in, {"names", "refused"} out (JSON)."""

from __future__ import annotations

import json
import sys
from typing import Any


def words_of(name: str, value: Any) -> list[str]:
    """("max_num_seqs", "8") -> ["--max-num-seqs", "8"]; True is a bare flag, False nothing."""
    flag = "--" + name.replace("_", "-")
    if value is True or value is False:
        return [flag] if value else []
    return [flag, *map(str, value if isinstance(value, (list, tuple)) else [value])]


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


def judge(parser: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Parse each flag alone, so that every mistake is reported."""

    def refuse(message: str) -> None:
        raise ValueError(message)

    parser.error = refuse
    names = {o.lstrip("-").replace("-", "_") for a in parser._actions for o in a.option_strings}
    refused = {}
    for name, value in given.items():
        try:
            parser.parse_args(words_of(name, value))
        except (ValueError, SystemExit) as error:
            refused[name] = str(error)
    return {"names": sorted(names), "refused": refused}


if __name__ == "__main__":
    print(json.dumps(judge(serve_parser(), json.load(sys.stdin))))

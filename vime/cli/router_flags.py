"""Checks --router-* flags with the parser of the installed vllm-router."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from vime.config import Config
from vime.config.spelling import as_flag, as_key, did_you_mean

OWNED = {  # flags that vime sets: the flag to use instead
    "host": "--vllm-router-ip",
    "port": "--vllm-router-port",
    "policy": "--vllm-router-policy",
    "worker_urls": "--rollout-num-gpus, which adds engines",
    "prometheus_port": "none: vime takes a free port",
}


def check_router_flags(cfg: Config) -> list[str]:
    """The problems of --vllm-router-policy and --router-*; [] if the router accepts them all."""
    given, policy = cfg.engine.router_args, cfg.engine.router_policy_asked
    if not given and policy is None:
        return []
    try:
        parser = _router_parser()
    except ImportError:
        if not given:
            return []  # the router checks the policy when it starts
        first = _spelled(*next(iter(given.items())))
        return [f"{first} cannot be checked: vllm-router is not installed. Install it."]
    names = {as_key(o) for a in parser._actions for o in a.option_strings}
    problems = []
    if policy is not None and (why := _refusal(parser, "policy", policy)):
        problems.append(f"--vllm-router-policy {policy}: vllm-router refuses it: {why}")
    for name, value in given.items():
        said = _spelled(name, value)
        if name in OWNED:
            problems.append(f"{said} is set by vime. Use {OWNED[name]}.")
        elif name not in names:
            hint = did_you_mean(name, names, shown=partial(as_flag, prefix="--router-"))
            problems.append(f"{said}: vllm-router has no such flag. {hint}".rstrip())
        elif why := _refusal(parser, name, value):
            problems.append(f"{said}: vllm-router refuses it: {why}")
    return problems


def _router_parser() -> argparse.ArgumentParser:
    from vllm_router.router_args import RouterArgs

    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    RouterArgs.add_cli_args(parser)
    return parser


def _refusal(parser: argparse.ArgumentParser, name: str, value: Any) -> str | None:
    def refuse(message: str) -> None:
        raise ValueError(message)

    parser.error = refuse
    try:
        parser.parse_args([as_flag(name), *_words(value)])
    except (ValueError, argparse.ArgumentError) as error:
        return str(error)
    return None


def _words(value: Any) -> list[str]:
    return [] if value is True else [*map(str, value if isinstance(value, list) else [value])]


def _spelled(name: str, value: Any) -> str:
    return " ".join([as_flag(name, "--router-"), *_words(value)])

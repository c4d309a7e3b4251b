"""Makes a `Config` from the command line. Only entry points and tools import this folder."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace

from vime.cli.command_line import read
from vime.cli.draft import Check, checked
from vime.cli.router_flags import check_router_flags
from vime.config import Config
from vime.config.hf_config import num_layers
from vime.config.notices import notices
from vime.config.rules import CONVERT_RULES, RULES
from vime.data.checks import data_problems


def parse_config(argv: Sequence[str] | None = None, checks: Iterable[Check] = ()) -> Config:
    """The configuration of a training command line.

    argv    the words after the program's name (default: `sys.argv[1:]`)
    checks  further checks, each of which lists problems: flag, value, remedy

    Prints notices to stderr. Prints all problems together and exits with code 2 if there are any.
    `--help` and `--dry-run` print and exit with code 0.
    """
    given = read(argv)
    cfg = checked(given, [*RULES, data_problems, check_router_flags, *checks])
    for notice in [*given.notices, *notices(cfg)]:
        print(f"note: {notice}", file=sys.stderr)
    cfg = _settled(cfg)
    if cfg.debug.dry_run:
        from vime.cli.dry_run import report  # imports torch

        print(report(cfg))
        raise SystemExit(0)
    return cfg


def parse_convert_config(argv: Sequence[str] | None = None, checks: Iterable[Check] = ()) -> Config:
    """The configuration of a checkpoint converter, which needs model, layout and `--save`."""
    given = read(argv)
    given.values["batch"].setdefault("prompts", 1)
    return _settled(checked(given, [*CONVERT_RULES, *checks]))


def _settled(cfg: Config) -> Config:
    """Counts virtual stages whose layers are given, and sets the flags that a notice tells of."""
    p = cfg.parallel
    if p.layers_per_virtual_stage is not None:
        chunks = num_layers(cfg) // p.pp // p.layers_per_virtual_stage
        p = replace(p, vpp=chunks if chunks > 1 else None, layers_per_virtual_stage=None)
    if p.sequence_parallel and p.tp == 1:
        p = replace(p, sequence_parallel=False)
    a = cfg.algorithm
    if cfg.takes_old_policy_from_engine:
        a = replace(a, use_rollout_logprobs=True)
    return replace(cfg, parallel=p, algorithm=a)

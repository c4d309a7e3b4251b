"""The text of `--help`: a group for each section, a line for each flag."""

from __future__ import annotations

import argparse
import json
from dataclasses import MISSING, fields
from typing import Any

from vime.cli.flags import MODEL_ARGS, STATED_FLAGS, Entry, all_flags, section_types
from vime.cli.megatron_flags import BF16, IDLE, STATED
from vime.config.fields import default_of

TITLES = {
    "cluster": "Cluster",
    "model": "Model",
    "parallel": "Parallel layout and memory (Megatron)",
    "optimizer": "Optimizer",
    "data": "Prompts",
    "batch": "Batch",
    "rollout": "Rollout",
    "reward": "Reward",
    "eval": "Evaluation",
    "checkpoint": "Checkpoints",
    "algorithm": "Algorithm",
    "engine": "vLLM and its router",
    "log": "Logging",
    "debug": "Debugging",
}


def describe(owner: str) -> tuple[str, str]:
    """The title and the first line of a group."""
    if owner == MODEL_ARGS:
        return (
            "MODEL_ARGS",
            "The architecture, in Megatron's flags. Optional: config.json defines it, and a flag "
            "that contradicts config.json is refused.",
        )
    if owner == STATED_FLAGS:
        return (
            "Also accepted",
            f"Flags with only one value, which vime uses anyway: {', '.join(_stated())}; "
            f"and flags that change nothing here: {', '.join(IDLE)}",
        )
    if owner == "engine":
        return TITLES[owner], "All other --vllm-* and --router-* flags go to vLLM and its router."
    doc = (section_types()[owner].__doc__ or "").strip().splitlines()[0]
    return TITLES.get(owner, owner), "" if doc.startswith(section_types()[owner].__name__) else doc


class HelpFormatter(argparse.HelpFormatter):
    """Shows the value that each flag takes. argparse itself would show `[X ...]` for every flag."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=44, width=120)

    def _format_usage(self, usage, actions, groups, prefix):
        return f"usage: {self._prog} --hf-checkpoint FOLDER --rollout-batch-size N [FLAG ...]\n\n"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        entry = all_flags().get(action.option_strings[-1])
        if entry is None:
            return ", ".join(action.option_strings)
        return f"{entry.name} {_metavar(entry)}".rstrip()


def help_of(entry: Entry) -> str:
    """A flag's effect and default. Stated flags have no help: the group's first line lists them."""
    if entry.owner == STATED_FLAGS:
        return argparse.SUPPRESS
    needs = f"(only with {entry.spec.only_with})" if entry.spec and entry.spec.only_with else ""
    return " ".join(filter(None, [_sentence(entry), needs, *_default(entry)])).replace("%", "%%")


def _stated() -> list[str]:
    return [
        f"{name} {spec.values[0] if spec.values else ''}".strip() for name, spec in STATED.items()
    ] + [f"{BF16} (--dtype bfloat16)"]


def _metavar(entry: Entry) -> str:
    if entry.is_switch:
        return ""
    if entry.spec and entry.spec.choices:
        return "{" + ",".join(entry.spec.choices) + "}"
    kind = {int: "N", float: "X", str: "TEXT", json.loads: "JSON"}.get(entry.parse, "FILE")
    return f"{kind} ..." if entry.nargs else kind


def _sentence(entry: Entry) -> str:
    if entry.spec is None:
        return ""
    if entry.is_switch and not entry.switch_value:
        return f"turn {entry.spec.name} off"
    if entry.spec.hook:
        return f"{entry.spec.help}: {entry.spec.hook.shape}"
    return entry.spec.help


def _default(entry: Entry) -> list[str]:
    default = _default_value(entry)
    if entry.spec and entry.spec.inherits:
        return [f"(default: {entry.spec.inherits})"]
    if default is MISSING:
        return ["(required)"] if entry.spec else []
    if default is None or entry.is_switch and default is False or default == {}:
        return []
    if entry.is_switch:
        return ["(on by default)"] if entry.switch_value else []
    return [f"(default: {default})"]


def _default_value(entry: Entry) -> Any:
    if entry.spec is None:
        return MISSING
    field = next(f for f in fields(section_types()[entry.owner]) if f.name == entry.field)
    return default_of(field)

"""Judges the answers of the probes: the driver's own answers are the measure.

The same versions and source, the same files under the same paths, the same functions of the user.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vime.addresses import is_loopback
from vime.config import Config
from vime.config.plugins import plugins_named_in

_SHARE_REMEDY = "Put it on storage that every node mounts at the same path"


@dataclass(frozen=True, slots=True)
class Asked:
    """The things that a node must have, under the flags that ask for them.

    paths    {path to read: flag and value}
    tokens   {file that the driver has just written: flag and value of its folder}
    modules  {module of a user's function: flag and value}
    """

    paths: dict[str, str]
    tokens: dict[str, str]
    modules: dict[str, str]


def problems_of(
    node: str, here: Mapping[str, Any], there: Mapping[str, Any], asked: Asked
) -> Iterator[str]:
    """The problems of one node.

    node         its address, for the messages
    here, there  the answers of `NodeProbe.look` at the driver and on the node
    """
    if there["problem"]:
        yield f"node {node}: {there['problem']}"
    elif is_loopback(there["address"]):
        yield (
            f"node {node} has the address {there['address']}, which other nodes cannot reach. "
            "Start its Ray with --node-ip-address ADDRESS, or give --node-interface."
        )
    for name, version in here["versions"].items():
        if (other := there["versions"].get(name)) != version:
            yield (
                f"node {node} has {name} {other or '(not installed)'}, the driver has "
                f"{version or '(not installed)'}. Install the same versions on every node."
            )
    if there["vime"] != here["vime"]:
        state = "has another version of vime's source" if there["vime"] else "has no vime"
        yield f"node {node} {state}. Install the driver's version of vime there."
    for path, flag in asked.paths.items():
        yield from _sights_differ(node, flag, here["paths"][path], there["paths"][path])
    for token, flag in asked.tokens.items():
        if not there["tokens"][token]:
            yield (
                f"{flag}: node {node} does not see the file that the driver writes to "
                f"{os.path.dirname(token)}. {_SHARE_REMEDY}."
            )
    for module, flag in asked.modules.items():
        if (found := there["modules"][module]) != here["modules"][module]:
            state = "has another version of" if found else "cannot find"
            yield (
                f"{flag}: node {node} {state} the module {module}. Give --working-dir FOLDER, "
                "which Ray copies to every node, or put the module on every node's PYTHONPATH."
            )


def _sights_differ(
    node: str, flag: str, here: dict[str, str] | None, there: dict[str, str] | None
) -> Iterator[str]:
    if here == there:
        return
    if there is None:
        yield f"{flag}: node {node} does not see it. {_SHARE_REMEDY}, or copy it there."
        return
    here = here or {}
    wrong = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    name = wrong[0]
    more = f" ({len(wrong)} files differ)" if len(wrong) > 1 else ""
    yield (
        f"{flag}: {name} on node {node} is {there.get(name, 'missing')}, at the driver it is "
        f"{here.get(name, 'missing')}{more}. {_SHARE_REMEDY}, or copy it again."
    )


def paths_to_read(cfg: Config) -> dict[str, str]:
    """The paths that trainer ranks and engines read."""
    files = cfg.checkpoint
    given = {
        "--hf-checkpoint": cfg.model.hf_checkpoint,
        "--load": files.load,
        "--ref-load": files.ref_load,
        "--opd-teacher-load": files.opd_teacher_load,
    }
    return {path: f"{flag} {path}" for flag, path in given.items() if path is not None}


@contextmanager
def tokens(cfg: Config) -> Iterator[dict[str, str]]:
    """Files beside the places to which nodes write, for the time of the block."""
    files = cfg.checkpoint
    given = {"--run-dir": cfg.log.run_dir, "--save": files.save, "--save-hf": files.save_hf}
    written: dict[str, str] = {}
    try:
        for flag, path in given.items():
            if path is not None:
                folder = Path(path.partition("{")[0]).absolute()
                while not folder.is_dir():
                    folder = folder.parent
                token = folder / f".vime-{uuid.uuid4().hex}"
                token.touch()
                written[str(token)] = f"{flag} {path}"
        yield written
    finally:
        for token in written:
            os.unlink(token)


def user_modules(cfg: Config) -> dict[str, str]:
    """The modules of the user's functions."""
    found = {p.path.rpartition(".")[0]: f"{p.named_by} {p.path}" for p in plugins_named_in(cfg)}
    return {name: flag for name, flag in found.items() if name.partition(".")[0] != "vime"}

"""Judges the answers of the probes: the driver's own answers are the measure.

The same versions and source, the same files under the same paths, the same functions of the user.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vime.addresses import bracketed, is_loopback
from vime.config import Config
from vime.config.plugins import plugins_named_in
from vime.config.spelling import as_flag
from vime.observe.run_log import DEFAULT_RUNS

_SHARE_REMEDY = "Put it on storage that every node mounts at the same path"


@dataclass(frozen=True, slots=True)
class Asked:
    """The things that a node must have, under the flags that ask for them.

    paths    {path to read: flag and value}
    tokens   {file that the driver has just written: flag and value of its folder}
    modules  {module of a user's function: flag and value}
    one_node  whether the run has one node only, which may have a loopback address
    """

    paths: dict[str, str]
    tokens: dict[str, str]
    modules: dict[str, str]
    one_node: bool = False


NODE = "{NODE}"  # stands for a node's address until `together`
_MOST_NAMED = 8


def together(problems: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """Every problem once, with the nodes that have it.

    problems  {address of a node: its problems, in which NODE stands for the address}
    """
    nodes: dict[str, list[str]] = defaultdict(list)
    for address, found in problems.items():
        for problem in found:
            nodes[problem].append(address)
    for problem, addresses in nodes.items():
        yield problem.replace(NODE, addresses[0] + _and_more(addresses[1:]))


def _and_more(addresses: list[str]) -> str:
    if not addresses:
        return ""
    dots = ", ..." if len(addresses) > _MOST_NAMED else ""
    return f" (and {len(addresses)} more: {', '.join(addresses[:_MOST_NAMED])}{dots})"


def unreached(
    reached: Mapping[str, Mapping[str, str]],
    ports: Sequence[tuple[str, str, int]],
    address: Mapping[str, str],
) -> Iterator[str]:
    """The problem of each node that cannot reach others.

    reached  {node id: {other node's id: the error}}
    ports    (node id, host, port) at which the probes listened
    address  {node id: the address that Ray uses}
    """
    tried = {node: (host, port) for node, host, port in ports}
    for node, failures in reached.items():
        if not failures:
            continue
        first, *others = failures
        host, port = tried[first]
        more = _and_more([address[other] for other in others])
        yield (
            f"node {address[node]} cannot reach node {address[first]} at {bracketed(host)}:{port}"
            f"{more}: {failures[first]}. A firewall may be between them: open all ports between "
            "the nodes, or give --node-interface (docs/clusters.md)."
        )


def problems_of(
    node: str, here: Mapping[str, Any], there: Mapping[str, Any], asked: Asked
) -> Iterator[str]:
    """The problems of one node.

    node         its address, for the messages
    here, there  the answers of `NodeProbe.look` at the driver and on the node
    """
    if there["problem"]:
        yield f"node {node}: {there['problem']}"
    elif is_loopback(there["address"]) and not asked.one_node:
        yield (
            f"node {node} has the address {there['address']}, which other nodes cannot reach. "
            "Start its Ray with --node-ip-address ADDRESS, or give --node-interface."
        )
    for name, other in there["versions"].items():
        if other != (version := here["versions"].get(name)):
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
        folder = os.path.dirname(token)
        if there["tokens"][token] == "missing":
            yield (
                f"{flag}: node {node} does not see the file that the driver writes to {folder}. "
                f"{_SHARE_REMEDY}."
            )
        elif there["tokens"][token] == "read-only":
            yield (
                f"{flag}: node {node} may not write to {folder}. Mount it there for writing, or "
                "choose another folder."
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
    """The paths that trainer ranks and engines read, those of vLLM's own flags included."""
    files = cfg.checkpoint
    of_vllm = {as_flag(name, "--vllm-"): v for name, v in cfg.engine.vllm_args.items()}
    given = {
        "--hf-checkpoint": cfg.model.hf_checkpoint,
        "--load": files.load,
        "--ref-load": files.ref_load,
        "--opd-teacher-load": files.opd_teacher_load,
        **{flag: v for flag, v in of_vllm.items() if _is_path(v)},
    }
    return {path: f"{flag} {path}" for flag, path in given.items() if path is not None}


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and "/" in value and os.path.exists(value)


@contextmanager
def tokens(cfg: Config) -> Iterator[dict[str, str]]:
    """Files beside the places to which nodes write, for the time of the block."""
    files, run_dir = cfg.checkpoint, cfg.log.run_dir or cfg.checkpoint.save or DEFAULT_RUNS
    given = {"--run-dir": run_dir, "--save": files.save, "--save-hf": files.save_hf}
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
    """The modules of the user's functions, and those beside them that this process has imported.

    The checks of the configuration import the user's functions, and so the modules they need.
    """
    found: dict[str, str] = {}
    for plugin in plugins_named_in(cfg):
        module, flag = plugin.path.rpartition(".")[0], f"{plugin.named_by} {plugin.path}"
        if module.partition(".")[0] != "vime":
            found[module] = flag
            for other in _imported_beside(module):
                found.setdefault(other, flag)
    return found


def _imported_beside(name: str) -> Iterator[str]:
    """Imported modules from the folder in which Python found the module `name`."""
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        return
    depth = name.count(".") + (Path(file).name == "__init__.py")
    folder = Path(file).parents[depth]
    for other, module in list(sys.modules.items()):
        path = Path(getattr(module, "__file__", None) or "/")
        foreign = "site-packages" in path.parts or other.partition(".")[0] in ("vime", "__main__")
        if path.is_relative_to(folder) and not foreign:
            yield other

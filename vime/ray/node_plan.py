"""The nodes on which a run trains and generates: pure arithmetic, without Ray.

A slot is one GPU, or one CPU slot on a cluster without GPUs. The trainer takes the same number of
slots on each of --actor-num-nodes nodes. An engine lies on one node; an engine that is larger than
a node lies on several, with the same number of slots on each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The slots that a run asks for.

    trainer_nodes, per_node  the trainer's nodes, and its slots on each
    num_engines, per_engine  engines, and slots of each
    per_part                 slots of an engine on one node
    shared                   engines lie on the trainer's slots
    """

    trainer_nodes: int
    per_node: int
    num_engines: int
    per_engine: int
    per_part: int
    shared: bool = False

    @classmethod
    def of(cls, cfg: Config) -> Shape:
        c, debug = cfg.cluster, cfg.debug
        shared = c.colocate and not debug.rollout_only
        return cls(
            trainer_nodes=0 if debug.rollout_only else c.actor_num_nodes,
            per_node=c.actor_gpus_per_node,
            num_engines=0 if debug.no_engines else c.num_engines,
            per_engine=c.gpus_per_engine,
            per_part=min(c.gpus_per_engine, c.actor_gpus_per_node if shared else c.gpus_per_node),
            shared=shared,
        )

    @property
    def parts_per_engine(self) -> int:
        return self.per_engine // self.per_part

    def __str__(self) -> str:
        """The flags that ask for this shape."""
        trainer = f"--actor-num-nodes {self.trainer_nodes} --actor-num-gpus-per-node"
        said = [f"{trainer} {self.per_node}"] if self.trainer_nodes else []
        if self.num_engines and not self.shared:
            said.append(f"--rollout-num-gpus {self.num_engines * self.per_engine}")
        if self.num_engines and self.per_engine > 1:
            said.append(f"--rollout-num-gpus-per-engine {self.per_engine}")
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


def plan(nodes: Sequence[Node], shape: Shape, *, unit: str = "GPUs") -> NodePlan:
    """The nodes for trainer and engines.

    nodes  the cluster's nodes, in the order in which the trainer's ranks shall follow

    The trainer takes the nodes on which it costs the fewest places for engines. All engines have
    one size, so this choice finds a placement whenever there is one. Raises ConfigError, with a
    table of the nodes and the nearest shapes that fit.
    """
    found = _planned(nodes, shape)
    if found is None:
        raise ConfigError(_refusal(nodes, shape, unit))
    return found


def _planned(nodes: Sequence[Node], shape: Shape) -> NodePlan | None:
    left = {node.id: node.free for node in nodes}
    trainers = _trainer_nodes(nodes, shape)
    if trainers is None:
        return None
    if shape.shared:
        parts = [n for n in trainers for _ in range(shape.per_node // shape.per_part)]
    else:
        for node in trainers:
            left[node] -= shape.per_node
        # Nodes of the trainer come first, then the nodes with the most places.
        order = {node.id: at for at, node in enumerate(nodes)}
        ranked = sorted(left, key=lambda n: (n not in trainers, -_places(left[n], shape), order[n]))
        parts = [n for n in ranked for _ in range(_places(left[n], shape))]
        parts = parts[: shape.num_engines * shape.parts_per_engine]
        parts.sort(key=order.__getitem__)
    return _with_engines(trainers, parts, shape)


def _trainer_nodes(nodes: Sequence[Node], shape: Shape) -> list[str] | None:
    """The ids of the trainer's nodes, in the order of `nodes`; None if too few have room."""

    def lost_places(node: Node) -> int:
        if shape.shared or not shape.num_engines:
            return 0
        return _places(node.free, shape) - _places(node.free - shape.per_node, shape)

    fitting = [node for node in nodes if node.free >= shape.per_node]
    fitting.sort(key=lambda node: (lost_places(node), node.free))  # a stable sort
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
    engines = []
    for i in range(shape.num_engines):
        mine = parts[i * num : (i + 1) * num]
        engines.append(dict.fromkeys(mine, shape.per_part))
        if len(engines[-1]) < num:  # two parts of one engine on one node
            return None
    return NodePlan(dict.fromkeys(trainers, shape.per_node), tuple(engines), shape.shared)


def _refusal(nodes: Sequence[Node], shape: Shape, unit: str) -> str:
    fits = [str(other) for other in _nearest(nodes, shape)]
    remedy = f"This would fit: {'; or '.join(fits)}." if fits else "No smaller run would fit."
    return (
        f"{shape} does not fit into the cluster:\n{table(nodes, unit)}\n{remedy} Or start more "
        "nodes (docs/clusters.md)."
    )


def _nearest(nodes: Sequence[Node], shape: Shape) -> Iterator[Shape]:
    """The largest shapes that fit: with fewer engines, with fewer nodes, with fewer slots each."""
    kinds: list[Iterator[Shape | None]] = []
    if not shape.shared:
        kinds.append(replace(shape, num_engines=n) for n in range(shape.num_engines - 1, 0, -1))
    fewer_nodes = range(shape.trainer_nodes - 1, 0, -1)
    kinds.append(_resized(shape, n, shape.per_node) for n in fewer_nodes)
    if shape.trainer_nodes:
        fewer_slots = range(shape.per_node - 1, 0, -1)
        kinds.append(_resized(shape, shape.trainer_nodes, n) for n in fewer_slots)
    for kind in kinds:
        if fitting := next((s for s in kind if s and _planned(nodes, s)), None):
            yield fitting


def _resized(shape: Shape, trainer_nodes: int, per_node: int) -> Shape | None:
    """The shape with another trainer; None if its engines could not share the trainer's slots."""
    changed = replace(shape, trainer_nodes=trainer_nodes, per_node=per_node)
    if not shape.shared or not shape.num_engines:
        return changed
    size, total = shape.per_engine, trainer_nodes * per_node
    part = min(size, per_node)
    if total % size or per_node % part or size % part:
        return None
    return replace(changed, num_engines=total // size, per_part=part)


def table(nodes: Sequence[Node], unit: str = "GPUs") -> str:
    """A line for each node, for error messages."""
    width = max([len("node"), *(len(node.address) for node in nodes)])
    lines = [f"  {'node':{width}}  {unit}  free"]
    lines += [f"  {n.address:{width}}  {n.slots:{len(unit)}}  {n.free:4}" for n in nodes]
    return "\n".join(lines)

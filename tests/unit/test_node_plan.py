"""Which nodes train and generate: every cluster that has room is used, and others are refused."""

from __future__ import annotations

import itertools
import random

import pytest

from tests.unit.fake_engine import make_config
from vime.errors import ConfigError
from vime.ray.node_plan import Node, Shape, _nearest, fits, plan, table


def cluster(*free: int, busy: int = 0) -> list[Node]:
    return [
        Node(id=f"n{i}", address=f"10.0.0.{i}", slots=f + busy, free=f) for i, f in enumerate(free)
    ]


def shape(nodes: int, per_node: int, engines: int = 0, size: int = 1, part: int | None = None):
    return Shape(
        trainer_nodes=nodes,
        per_node=per_node,
        num_engines=engines,
        per_engine=size,
        per_part=part or size,
    )


def shared(nodes: int, per_node: int, size: int) -> Shape:
    return Shape(
        trainer_nodes=nodes,
        per_node=per_node,
        num_engines=nodes * per_node // size,
        per_engine=size,
        per_part=min(size, per_node),
        shared=True,
    )


def test_trainer_and_engines_share_one_node_if_it_has_room():
    found = plan(cluster(8, 8), shape(1, 4, engines=2, size=2))
    assert found.trainers == {"n0": 4}
    assert found.engines == ({"n0": 2}, {"n0": 2})
    assert found.nodes == ("n0",)


def test_the_trainer_leaves_the_large_node_to_an_engine_that_needs_it():
    found = plan(cluster(8, 4), shape(1, 4, engines=1, size=8))
    assert (found.trainers, found.engines) == ({"n1": 4}, ({"n0": 8},))


def test_a_trainer_on_two_nodes_has_the_same_number_of_slots_on_each():
    found = plan(cluster(2, 8, 8), shape(2, 8))
    assert found.trainers == {"n1": 8, "n2": 8}


def test_colocated_engines_lie_on_the_trainer_s_nodes():
    found = plan(cluster(4, 4, 4), shared(2, 4, size=2))
    assert found.trainers == {"n0": 4, "n1": 4}
    assert found.engines == ({"n0": 2}, {"n0": 2}, {"n1": 2}, {"n1": 2})


def test_a_colocated_engine_that_is_larger_than_a_node_lies_on_whole_nodes():
    found = plan(cluster(4, 4, 4, 4), shared(4, 4, size=8))
    assert found.engines == ({"n0": 4, "n1": 4}, {"n2": 4, "n3": 4})


def test_an_engine_that_is_larger_than_a_node_lies_on_nodes_without_a_trainer():
    found = plan(cluster(8, 8, 8), shape(1, 8, engines=1, size=16, part=8))
    assert found.trainers == {"n0": 8}
    assert found.engines == ({"n1": 8, "n2": 8},)


def test_an_engine_never_lies_on_the_remains_of_two_nodes():
    with pytest.raises(ConfigError):
        plan(cluster(3, 3), shape(1, 2, engines=1, size=4))


def test_slots_that_another_run_holds_are_not_used():
    busy = Node(id="b", address="10.0.0.9", slots=8, free=2)
    found = plan([busy, *cluster(4)], shape(1, 4))
    assert found.trainers == {"n0": 4}


def test_among_equal_nodes_the_driver_s_comes_first():
    """Then a small run stays on one node."""
    found = plan(cluster(8, 8, 8), shape(1, 4, engines=4), driver="n1")
    assert found.nodes == ("n1",)
    apart = plan(cluster(8, 8, 4), shape(1, 8, engines=4), driver="n2")
    assert (apart.trainers, apart.engines) == ({"n0": 8}, ({"n2": 1},) * 4)


def test_ranks_follow_the_order_of_the_nodes_wherever_the_driver_is():
    assert list(plan(cluster(4, 4), shape(2, 4), driver="n1").trainers) == ["n0", "n1"]


def test_nodes_are_in_the_order_of_their_addresses():
    in_order = ["a-host", "9.0.0.1", "10.0.0.9", "10.0.0.10", "[fd00::9]", "fd00::10"]
    nodes = [Node(id="x", address=address, slots=1, free=1) for address in reversed(in_order)]
    assert [node.address for node in sorted(nodes, key=lambda n: n.order)] == in_order


def refusal(nodes: list[Node], wanted: Shape) -> str:
    with pytest.raises(ConfigError) as refused:
        plan(nodes, wanted)
    (text,) = refused.value.problems
    return text


def test_a_refusal_shows_the_flags_the_cluster_and_what_would_fit():
    text = refusal(cluster(8, 4, busy=4), shape(2, 8, engines=1))
    assert text.splitlines() == [
        "--actor-num-nodes 2 --actor-num-gpus-per-node 8 --rollout-num-gpus 1 does not fit into "
        "the cluster:",
        "  node      GPUs  free",
        "  10.0.0.0    12     8",
        "  10.0.0.1     8     4",
        "Wait until other runs free their slots. This would fit: --actor-num-nodes 1 "
        "--actor-num-gpus-per-node 8 --rollout-num-gpus 1; or --actor-num-nodes 2 "
        "--actor-num-gpus-per-node 4 --rollout-num-gpus 1. More nodes can join the cluster "
        "(docs/clusters.md).",
    ]


def test_a_missing_node_is_seen_in_the_table_and_one_node_less_would_fit():
    text = refusal(cluster(8, 8), shape(2, 8, engines=8))
    assert "Wait" not in text
    assert "--actor-num-nodes 1 --actor-num-gpus-per-node 8 --rollout-num-gpus 8;" in text
    assert "--actor-num-nodes 2 --actor-num-gpus-per-node 4 --rollout-num-gpus 8." in text


def test_fewer_nodes_with_fewer_slots_are_proposed_if_nothing_else_fits():
    text = refusal(cluster(3), shape(2, 4, engines=4))
    assert "--actor-num-nodes 1 --actor-num-gpus-per-node 2 --rollout-num-gpus 1." in text


def test_a_node_too_small_for_an_engine_calls_for_smaller_engines_or_more_nodes():
    text = refusal(cluster(4, 4, 4), shape(1, 2, engines=1, size=8))
    head = "--actor-num-nodes 1 --actor-num-gpus-per-node 2 --rollout-num-gpus 8"
    assert f"{head} --rollout-num-gpus-per-engine 4;" in text
    assert f"{head} --rollout-num-gpus-per-engine 8 --num-gpus-per-node 4." in text


def test_a_proposal_keeps_the_trainer_s_layout():
    wanted = Shape(trainer_nodes=1, per_node=8, num_engines=0, per_engine=1, per_part=1, multiple=4)
    assert "--actor-num-gpus-per-node 4." in refusal(cluster(7), wanted)


def test_a_colocated_refusal_proposes_engines_that_divide_the_trainer():
    text = refusal(cluster(6, 6), shared(2, 8, size=4))
    assert text.startswith(
        "--actor-num-nodes 2 --actor-num-gpus-per-node 8 --colocate "
        "--rollout-num-gpus-per-engine 4 does not fit"
    )
    assert "--actor-num-nodes 2 --actor-num-gpus-per-node 4 --colocate" in text


def test_what_a_refusal_proposes_does_fit():
    rng = random.Random(1)
    refused = 0
    for _ in range(500):
        nodes = cluster(*(rng.randint(0, 8) for _ in range(rng.randint(1, 4))))
        part, parts = rng.randint(1, 4), rng.choice([1, 1, 2])
        size = (rng.randint(1, 3), rng.randint(1, 8))
        wanted = rng.choice(
            [shape(*size, rng.randint(1, 9), part * parts, part=part), shared(*size, size[1])]
        )
        if fits(nodes, wanted):
            continue
        refused += 1
        for smaller in _nearest(nodes, wanted):
            assert fits(nodes, smaller), (nodes, wanted, smaller)
            assert smaller != wanted
        enough = 1 if wanted.shared else 1 + wanted.num_engines
        if sum(node.free for node in nodes) >= enough and wanted.parts_per_engine == 1:
            assert _nearest(nodes, wanted), (nodes, wanted)
    assert refused > 100


def test_a_cluster_without_any_slot_says_that_nothing_fits():
    assert "No smaller run would fit." in refusal(cluster(0), shape(1, 1))


def test_the_table_has_a_line_for_each_node():
    assert table(cluster(1, 2), "CPU slots").splitlines() == [
        "  node      CPU slots  free",
        "  10.0.0.0          1     1",
        "  10.0.0.1          2     2",
    ]


def fits_somehow(free: list[int], wanted: Shape) -> bool:
    """Tries every choice of trainer nodes."""
    for chosen in itertools.combinations(range(len(free)), wanted.trainer_nodes):
        left = [f - wanted.per_node * (i in chosen) for i, f in enumerate(free)]
        if min(left) < 0:
            continue
        if wanted.parts_per_engine == 1:
            places = sum(f // wanted.per_part for f in left)
        else:
            places = sum(f >= wanted.per_part for f in left)
        if places >= wanted.num_engines * wanted.parts_per_engine:
            return True
    return False


def test_a_plan_is_found_whenever_there_is_one():
    rng = random.Random(0)
    outcomes = set()
    for _ in range(3000):
        free = [rng.randint(0, 8) for _ in range(rng.randint(1, 5))]
        part, parts = rng.randint(1, 4), rng.choice([1, 1, 2])
        wanted = shape(
            rng.randint(0, 3), rng.randint(1, 4), rng.randint(0, 4), part * parts, part=part
        )
        try:
            found = plan(cluster(*free), wanted)
        except ConfigError:
            found = None
        assert (found is not None) == fits_somehow(free, wanted), (free, wanted)
        outcomes.add(found is not None)
        if found is None:
            continue
        used = [0] * len(free)
        for part_of in [found.trainers, *found.engines]:
            for node, count in part_of.items():
                used[int(node[1:])] += count
        assert all(u <= f for u, f in zip(used, free, strict=True))
        assert list(found.trainers.values()) == [wanted.per_node] * wanted.trainer_nodes
        assert [sum(e.values()) for e in found.engines] == [wanted.per_engine] * wanted.num_engines
    assert outcomes == {True, False}


@pytest.mark.parametrize(
    ("cluster_flags", "expected"),
    [
        ({"actor_num_nodes": 2, "actor_gpus_per_node": 8}, (2, 8, 16, 1, 1, False)),
        ({"actor_gpus_per_node": 8, "colocate": True, "gpus_per_engine": 4}, (1, 8, 2, 4, 4, True)),
        (
            {
                "actor_num_nodes": 4,
                "actor_gpus_per_node": 8,
                "colocate": True,
                "gpus_per_engine": 16,
            },
            (4, 8, 2, 16, 8, True),
        ),
        (
            {"actor_gpus_per_node": 2, "rollout_gpus_asked": 32, "gpus_per_engine": 16},
            (1, 2, 2, 16, 8, False),
        ),
    ],
)
def test_the_shape_follows_from_the_flags(tmp_path, cluster_flags, expected):
    s = Shape.of(make_config(tmp_path, cluster=cluster_flags))
    assert (
        s.trainer_nodes, s.per_node, s.num_engines, s.per_engine, s.per_part, s.shared
    ) == expected  # fmt: skip

"""Slots follow the order of nodes and GPUs, whichever GPUs Ray gives to the bundles."""

from __future__ import annotations

import pytest

from vime.ray.node_facts import NodeFacts

pytest.importorskip("ray")
pytestmark = pytest.mark.stack

FACTS = {name: NodeFacts(id=name, address=f"10.0.0.{name}", cores=8) for name in "12"}


def test_gpus_are_in_the_order_of_the_plan_s_nodes_and_of_their_indices():
    """Nodes 1 and 2 train on two GPUs each, and each has an engine on its third."""
    from vime.ray.placement_group import _in_order

    slots = _in_order([7, 0, 5, 3, 2, 4], list("112212"), FACTS)
    assert [(s.node.id, s.device) for s in slots] == [
        ("1", 0), ("1", 2), ("2", 3), ("2", 4), ("1", 7), ("2", 5)
    ]  # fmt: skip
    assert [s.bundle for s in slots] == [1, 4, 3, 5, 0, 2]


def test_the_manager_is_on_the_driver_s_node_and_an_actor_on_its_bundle():
    from vime.ray.placement_group import Placement, Slot

    slot = Slot(bundle=3, node=FACTS["2"], device=1)
    driver = NodeFacts(id="9" * 56, address="10.0.0.9", cores=8)
    placement = Placement(None, "GPU", (slot,), ((slot,),), driver, shared=True)
    where = placement.manager_options
    assert where["num_cpus"] == 0
    assert where["scheduling_strategy"].node_id == driver.id
    assert not where["scheduling_strategy"].soft
    options = placement.options("trainer", slot)
    assert options["scheduling_strategy"].placement_group_bundle_index == 3
    assert (options["num_cpus"], options["num_gpus"]) == (0, 0.4)
    assert placement.num_nodes == 2

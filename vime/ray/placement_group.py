"""The placement of trainer ranks and engines on the bundles of a Ray placement group.

One bundle is one GPU, or one CPU slot on a machine without GPUs. Bundles are sorted by node and
GPU, so neighbours in the order are neighbours on the hardware. The first bundles train, the rest
generate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from vime.config import Config
from vime.errors import ConfigError
from vime.platform import Platform, current
from vime.ray.slots import too_many
from vime.ray.wait import wait, wait_all

# The fractions of a bundle for trainer and engine under --colocate. Their sum must stay below 1.
_SHARE = {"trainer": 0.4, "engine": 0.2}
_PLACE_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Placement:
    """Bundle indices in hardware order, and the GPU id (on CPU the slot's number) of each."""

    group: PlacementGroup
    resource: str
    device_ids: dict[int, int]
    trainer_bundles: tuple[int, ...]
    engine_bundles: tuple[int, ...]
    shared: bool

    def options(self, role: str, bundle: int) -> dict[str, Any]:
        """Ray options that put one actor of `role` ("trainer" or "engine") on `bundle`."""
        amount = _SHARE[role] if self.shared else 1
        resources = {"num_cpus": 0, "num_gpus": 0, f"num_{self.resource.lower()}s": amount}
        strategy = PlacementGroupSchedulingStrategy(
            self.group,
            placement_group_bundle_index=bundle,
            placement_group_capture_child_tasks=False,
        )
        return {**resources, "scheduling_strategy": strategy}

    def remove(self) -> None:
        remove_placement_group(self.group)


def place(cfg: Config) -> Placement:
    """Reserve bundles. Raises ConfigError if Ray has too few, TimeoutError if they stay busy."""
    platform, cluster = current(), cfg.cluster
    have = ray.cluster_resources().get(platform.ray_resource, 0)
    if problems := too_many(cfg, platform, have):
        raise ConfigError(*problems)
    num = cfg.total_gpus
    group = placement_group([{platform.ray_resource: 1}] * num, strategy="PACK")
    wait(
        group.ready(),
        what=f"a placement group of {num} {platform.ray_resource}s",
        timeout_s=_PLACE_TIMEOUT_S,
    )
    where = _where_bundles_are(group, num, platform)
    if len(nodes := {address for address, _ in where}) > 1:
        remove_placement_group(group)
        raise ConfigError(
            f"the run needs {num} {platform.ray_resource}s, and Ray found them on {len(nodes)} "
            "nodes. vime runs on one node: ask for no more than one node has."
        )
    order = sorted(range(num), key=lambda i: where[i])
    device_ids = {bundle: device for bundle, (_, device) in enumerate(where)}
    trainers = () if cfg.debug.rollout_only else tuple(order[: cluster.trainer_gpus])
    engines = tuple(order[len(trainers) :])
    if cluster.colocate and not cfg.debug.rollout_only:
        engines = trainers
    return Placement(group, platform.ray_resource, device_ids, trainers, engines, cluster.colocate)


def _where_bundles_are(
    group: PlacementGroup, num: int, platform: Platform
) -> list[tuple[tuple, int]]:
    """(node address, GPU id or slot number) of each bundle."""
    if not platform.is_cuda and len(ray.nodes()) == 1:
        return [((), i) for i in range(num)]  # the bundles are all alike, and probes cost seconds
    probe = ray.remote(_where)
    amount = {"num_cpus": 0, f"num_{platform.ray_resource.lower()}s": 1}
    refs = [
        probe.options(
            **amount,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=i
            ),
        ).remote(i)
        for i in range(num)
    ]
    return wait_all(refs, what="the probes of the placement group", timeout_s=_PLACE_TIMEOUT_S)


def _where(bundle: int) -> tuple[tuple[int, ...], int]:
    address = tuple(int(part) for part in ray.util.get_node_ip_address().split("."))
    ids = ray.get_gpu_ids()
    return address, int(ids[0]) if ids else bundle

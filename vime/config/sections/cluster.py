"""The cluster: the nodes and GPUs that train and generate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from vime.config.fields import Path, Section, flag, json_object


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig(Section):
    """GPUs of trainer and engines. On a machine without GPUs one CPU slot stands for one GPU."""

    actor_num_nodes: int = flag("--actor-num-nodes", "nodes that train", default=1, at_least=1)
    actor_gpus_per_node: int = flag(
        "--actor-num-gpus-per-node", "GPUs per node that train", default=8, at_least=1
    )
    rollout_gpus_asked: int | None = flag(
        "--rollout-num-gpus",
        "GPUs that generate (default: as many as train); ignored with --colocate",
        default=None,
        at_least=1,
    )
    gpus_per_engine: int = flag(
        "--rollout-num-gpus-per-engine",
        "GPUs per vLLM engine, its tensor-parallel size",
        default=1,
        at_least=1,
    )
    gpus_per_node: int = flag("--num-gpus-per-node", "GPUs of a node", default=8, at_least=1)
    colocate: bool = flag("--colocate", "train and generate on the same GPUs", default=False)
    offload: bool = flag(
        "--offload",
        "short for --offload-train --offload-rollout",
        default=False,
        only_with="--colocate",
    )
    offload_train_asked: bool | None = flag(
        "--offload-train",
        "move the trainer's state to pinned host memory while engines generate (default: with "
        "--colocate)",
        default=None,
        negated="--no-offload-train",
    )
    offload_rollout_asked: bool | None = flag(
        "--offload-rollout",
        "free the engines' GPU memory while the trainer works (default: with --colocate)",
        default=None,
        negated="--no-offload-rollout",
    )
    train_memory_margin_bytes: int = flag(
        "--train-memory-margin-bytes",
        "GPU memory that the trainer leaves free for allocations outside PyTorch",
        default=1 << 30,
        at_least=0,
    )
    cpu_slots: int | None = flag(
        "--cpu-slots",
        "number of CPU slots on a machine without GPUs (default: its cores)",
        default=None,
        at_least=1,
    )
    device: str = flag(
        "--device",
        "train and generate on GPUs (cuda) or on CPU slots (cpu); auto: on GPUs if the cluster of "
        "RAY_ADDRESS has any, without it if this machine has any",
        default="auto",
        choices=("auto", "cuda", "cpu"),
    )
    node_interface: str | None = flag(
        "--node-interface",
        "network interface whose address processes on other nodes use (default: Ray's address)",
        default=None,
    )
    working_dir: Path | None = flag(
        "--working-dir",
        "folder of your code: it is put on the path, and Ray copies it to every node",
        default=None,
    )
    train_env_vars: dict = flag(
        "--train-env-vars",
        'environment of the trainer\'s processes, as a JSON object: \'{"NCCL_DEBUG": "INFO"}\'',
        default={},
        type=json_object,
    )
    distributed_timeout_minutes: float = flag(
        "--distributed-timeout-minutes", "deadline of a collective operation", default=10.0, above=0
    )

    @property
    def trainer_gpus(self) -> int:
        return self.actor_num_nodes * self.actor_gpus_per_node

    @property
    def rollout_gpus(self) -> int:
        if self.colocate or self.rollout_gpus_asked is None:
            return self.trainer_gpus
        return self.rollout_gpus_asked

    @property
    def offload_train(self) -> bool:
        return self.colocate and self.offload_train_asked is not False

    @property
    def offload_rollout(self) -> bool:
        return self.colocate and self.offload_rollout_asked is not False

    @property
    def num_engines(self) -> int:
        return self.rollout_gpus // self.gpus_per_engine

    @property
    def total_gpus(self) -> int:
        return self.trainer_gpus if self.colocate else self.trainer_gpus + self.rollout_gpus

    def problems(self) -> Iterator[str]:
        if self.rollout_gpus % self.gpus_per_engine:
            other = "--actor-num-gpus-per-node" if self.colocate else "--rollout-num-gpus"
            yield (
                f"--rollout-num-gpus-per-engine {self.gpus_per_engine} does not divide the "
                f"{self.rollout_gpus} GPUs that generate. Give a divisor of {self.rollout_gpus}, "
                f"or change {other}."
            )
        for name, asked in (
            ("--offload-train", self.offload_train_asked),
            ("--offload-rollout", self.offload_rollout_asked),
        ):
            if asked and not self.colocate:
                yield f"{name} has no effect without --colocate. Add that, or leave it out."
            if self.offload and asked is False:
                yield f"--offload asks for {name}, and --no{name[1:]} forbids it. Leave one out."
        for name, value in self.train_env_vars.items():
            if not isinstance(value, str):
                given = json.dumps(value)
                yield (
                    f"--train-env-vars: {name} is {given}, and the values of environment variables "
                    f'are texts. Put it into quotes: {{"{name}": {json.dumps(given)}}}.'
                )
            elif not name or set(name) & set("=\0") or "\0" in value:
                yield (
                    f"--train-env-vars: {name!r} cannot be an environment variable. Give names "
                    'without "=", and neither names nor values with a zero byte.'
                )
        if self.actor_gpus_per_node > self.gpus_per_node:
            yield (
                f"--actor-num-gpus-per-node {self.actor_gpus_per_node} is more than "
                f"--num-gpus-per-node {self.gpus_per_node}. Lower the first, or raise the second "
                "to the number of GPUs of a node."
            )

"""The machine: who runs where, in which layout, with which logs and limits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vime.config.fields import Path, Section, flag


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig(Section):
    """Who runs where. On a machine without GPUs one CPU slot stands for one GPU."""

    actor_num_nodes: int = flag("--actor-num-nodes", "nodes that train", default=1, at_least=1)
    actor_gpus_per_node: int = flag(
        "--actor-num-gpus-per-node", "GPUs that train, per node", default=8, at_least=1
    )
    rollout_gpus_asked: int | None = flag(
        "--rollout-num-gpus",
        "GPUs that generate; ignored under --colocate",
        default=None,
        at_least=1,
    )
    gpus_per_engine: int = flag(
        "--rollout-num-gpus-per-engine",
        "GPUs of one vLLM engine (its tensor parallel size)",
        default=1,
        at_least=1,
    )
    gpus_per_node: int = flag("--num-gpus-per-node", "GPUs that a node has", default=8, at_least=1)
    colocate: bool = flag("--colocate", "train and generate on the same GPUs", default=False)
    offload: bool = flag("--offload", "--offload-train and --offload-rollout in one", default=False)
    offload_train_asked: bool | None = flag(
        "--offload-train",
        "move the trainer's state to pinned memory while engines generate (default: under --colocate)",
        default=None,
        negated="--no-offload-train",
    )
    offload_rollout_asked: bool | None = flag(
        "--offload-rollout",
        "let engines give up their GPU memory while the trainer works (default: under --colocate)",
        default=None,
        negated="--no-offload-rollout",
    )
    train_memory_margin_bytes: int = flag(
        "--train-memory-margin-bytes",
        "GPU memory that the trainer leaves free for what allocates outside of it",
        default=1 << 30,
        at_least=0,
    )
    cpu_slots: int | None = flag(
        "--cpu-slots",
        "stand-ins for GPUs on a machine without any (default: its cores)",
        default=None,
        at_least=1,
    )
    distributed_timeout_minutes: float = flag(
        "--distributed-timeout-minutes", "deadline of a collective", default=10.0, above=0
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
            yield (
                f"--rollout-num-gpus-per-engine {self.gpus_per_engine} does not divide the {self.rollout_gpus} GPUs that generate. "
                f"Give a divisor of {self.rollout_gpus}, or change {'--actor-num-gpus-per-node' if self.colocate else '--rollout-num-gpus'}."
            )
        for name, asked in (
            ("--offload", self.offload),
            ("--offload-train", self.offload_train_asked),
            ("--offload-rollout", self.offload_rollout_asked),
        ):
            if asked and not self.colocate:
                yield f"{name} makes room on GPUs that trainer and engines share, and they share none. Add --colocate, or leave it out."
        if self.offload and False in (self.offload_train_asked, self.offload_rollout_asked):
            yield "--offload asks for what --no-offload-train or --no-offload-rollout forbids. Leave one out."
        if self.actor_gpus_per_node > self.gpus_per_node:
            yield (
                f"--actor-num-gpus-per-node {self.actor_gpus_per_node} is more than --num-gpus-per-node {self.gpus_per_node}. "
                "Lower the first, or raise the second to what a node has."
            )


RECOMPUTABLE = ("core_attn", "layernorm", "mlp_act", "mlp", "moe", "shared_experts", "mla_up_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig(Section):
    """Megatron's layout."""

    tp: int = flag("--tensor-model-parallel-size", default=1, at_least=1)
    pp: int = flag("--pipeline-model-parallel-size", default=1, at_least=1)
    cp: int = flag("--context-parallel-size", default=1, at_least=1)
    ep: int = flag("--expert-model-parallel-size", default=1, at_least=1)
    etp: int = flag("--expert-tensor-parallel-size", default=1, at_least=1)
    vpp: int | None = flag("--virtual-pipeline-model-parallel-size", default=None, at_least=2)
    sequence_parallel: bool = flag("--sequence-parallel", default=False)
    recompute_granularity: str | None = flag(
        "--recompute-granularity", default=None, choices=("full", "selective")
    )
    recompute_method: str | None = flag(
        "--recompute-method", default=None, choices=("uniform", "block")
    )
    recompute_num_layers: int | None = flag("--recompute-num-layers", default=None, at_least=1)
    recompute_modules: list | None = flag(
        "--recompute-modules",
        f"what --recompute-granularity selective makes again: {', '.join(RECOMPUTABLE)} (default: core_attn)",
        default=None,
        nargs="+",
    )
    use_distributed_optimizer: bool = flag(
        "--use-distributed-optimizer", "shard the optimizer over data parallel ranks", default=False
    )
    overlap_grad_reduce: bool = flag("--overlap-grad-reduce", default=False)
    overlap_param_gather: bool = flag("--overlap-param-gather", default=False)

    def data_parallel_size(self, world: int) -> int:
        return world // (self.tp * self.pp * self.cp)

    def problems(self) -> Iterator[str]:
        if self.vpp is not None and self.pp == 1:
            yield (
                f"--virtual-pipeline-model-parallel-size {self.vpp} needs a pipeline, and --pipeline-model-parallel-size is 1. "
                "Raise the second, or leave the first out."
            )
        if self.recompute_granularity == "full" and self.recompute_method is None:
            yield "--recompute-granularity full needs a method. Add --recompute-method uniform --recompute-num-layers 1."
        if self.recompute_method and self.recompute_granularity != "full":
            yield (
                f"--recompute-method {self.recompute_method} acts only with --recompute-granularity full (now {self.recompute_granularity}). "
                "Add that, or leave the method out."
            )
        if self.recompute_method and self.recompute_num_layers is None:
            yield f"--recompute-method {self.recompute_method} needs a number of layers. Add --recompute-num-layers 1."
        unknown = [m for m in self.recompute_modules or () if m not in RECOMPUTABLE]
        if unknown:
            yield f"--recompute-modules {' '.join(unknown)}: the modules are {', '.join(RECOMPUTABLE)}. Name some of these."
        if self.recompute_modules and self.recompute_granularity != "selective":
            yield (
                f"--recompute-modules {' '.join(self.recompute_modules)} acts only with --recompute-granularity selective (now {self.recompute_granularity}). "
                "Add that, or leave the modules out."
            )
        if self.overlap_param_gather and not self.use_distributed_optimizer:
            yield "--overlap-param-gather has nothing to gather. Add --use-distributed-optimizer, or leave it out."
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            yield "--overlap-param-gather needs --overlap-grad-reduce. Add it, or leave both out."


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(Section):
    """vLLM and its router. `vllm_args` and `router_args` hold every other --vllm-* and --router-* flag as given, for
    the parsers of those programs."""

    vllm_args: dict[str, Any] = field(default_factory=dict)
    router_args: dict[str, Any] = field(default_factory=dict)
    router_policy_asked: str | None = flag(
        "--vllm-router-policy",
        "default: round_robin; sticky_least_loaded with --custom-generate-function-path, whose samples may ask several times",
        default=None,
    )
    router_ip: str | None = flag(
        "--vllm-router-ip", "an address to bind (default: this node's)", default=None
    )
    router_port: int | None = flag(
        "--vllm-router-port", "default: a free one", default=None, at_least=1, at_most=65535
    )
    request_timeout_s: float = flag("--router-request-timeout-secs", default=14400.0, above=0)
    weight_transfer_timeout_s: float = flag(
        "--vllm-weight-transfer-timeout-sec", default=900.0, above=0
    )
    start_timeout_s: float = flag(
        "--vllm-start-timeout-sec",
        "deadline for an engine to become healthy",
        default=600.0,
        above=0,
    )
    fault_tolerance: bool = flag(
        "--use-fault-tolerance",
        "start an engine that died again, with the trainer's weights, and repeat what failed without it",
        default=False,
    )
    update_weight_buffer_size: int = flag(
        "--update-weight-buffer-size",
        "bytes of one bucket of weights",
        default=512 << 20,
        at_least=1,
    )
    update_weights_interval: int = flag(
        "--update-weights-interval",
        "give the engines new weights after every so many rollouts",
        default=1,
        at_least=1,
    )
    check_weight_update_equal: bool = flag(
        "--check-weight-update-equal",
        "compare checksums, tensor by tensor, after each update",
        default=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig(Section):
    run_dir: Path | None = flag(
        "--run-dir", "where metrics.jsonl goes (default: --save, else runs/DATE-TIME)", default=None
    )
    use_tensorboard: bool = flag("--use-tensorboard", default=False)
    tb_dir: Path | None = flag("--tb-dir", "default: RUN_DIR/tensorboard", default=None)
    use_wandb: bool = flag("--use-wandb", default=False)
    wandb_project: str | None = flag("--wandb-project", default=None)
    wandb_group: str | None = flag("--wandb-group", default=None)
    progress: str = flag(
        "--progress",
        "rich: a live line; plain: one line a step",
        default="auto",
        choices=("auto", "rich", "plain", "none"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DebugConfig(Section):
    train_only: bool = flag(
        "--debug-train-only", "no engines: the rollout function reads data itself", default=False
    )
    rollout_only: bool = flag(
        "--debug-rollout-only", "no trainer: engines serve --hf-checkpoint as it is", default=False
    )
    save_rollout_data: Path | None = flag(
        "--save-debug-rollout-data",
        "write each rollout to a file: 'dir/{rollout_id}.pt'",
        default=None,
    )
    load_rollout_data: Path | None = flag(
        "--load-debug-rollout-data", "train on rollouts written so; starts no engines", default=None
    )
    dry_run: bool = flag(
        "--dry-run",
        "print the resolved configuration, the batch arithmetic and a memory estimate, then exit",
        default=False,
    )
    plan_gpu_gib: float | None = flag(
        "--plan-gpu-memory",
        "with --dry-run: plan for GPUs of so many GiB, whatever this machine has",
        default=None,
        above=0,
    )

    def problems(self) -> Iterator[str]:
        if self.train_only and self.rollout_only:
            yield "--debug-train-only and --debug-rollout-only leave nothing to run. Give one."
        if self.plan_gpu_gib is not None and not self.dry_run:
            yield f"--plan-gpu-memory {self.plan_gpu_gib} is for a plan, and this is a run. Add --dry-run, or leave it out."
        if self.rollout_only and self.load_rollout_data is not None:
            yield f"--load-debug-rollout-data {self.load_rollout_data} is for training, and --debug-rollout-only trains nothing. Drop one of the two."
        for name, path in (
            ("--save-debug-rollout-data", self.save_rollout_data),
            ("--load-debug-rollout-data", self.load_rollout_data),
        ):
            if path is not None and "{rollout_id}" not in path:
                yield f"{name} {path} names one file for all rollouts. Put {{rollout_id}} into it, as in 'debug/{{rollout_id}}.pt'."

    @property
    def begins_anywhere(self) -> bool:
        """Whether a run may begin at any rollout without the data state of the one before."""
        return self.rollout_only or self.load_rollout_data is not None

    @property
    def no_engines(self) -> bool:
        return self.train_only or self.load_rollout_data is not None

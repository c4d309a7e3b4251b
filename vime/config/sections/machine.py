"""The machinery: the parallel layout, engines, logs, debugging."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vime.config.fields import Path, Section, flag

RECOMPUTABLE = ("core_attn", "layernorm", "mlp_act", "mlp", "moe", "shared_experts", "mla_up_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig(Section):
    """Megatron's layout."""

    tp: int = flag(
        "--tensor-model-parallel-size", "GPUs that share each layer", default=1, at_least=1
    )
    pp: int = flag(
        "--pipeline-model-parallel-size",
        "number of stages of layers, each on its own GPUs",
        default=1,
        at_least=1,
    )
    cp: int = flag(
        "--context-parallel-size", "GPUs that share each sequence", default=1, at_least=1
    )
    ep: int = flag(
        "--expert-model-parallel-size",
        "GPUs that the experts are divided among",
        default=1,
        at_least=1,
    )
    etp: int = flag(
        "--expert-tensor-parallel-size", "GPUs that share each expert", default=1, at_least=1
    )
    first_stage_layers: int | None = flag(
        "--decoder-first-pipeline-num-layers",
        "layers of the first pipeline stage (default: the same number in every stage)",
        default=None,
        at_least=1,
    )
    last_stage_layers: int | None = flag(
        "--decoder-last-pipeline-num-layers",
        "layers of the last pipeline stage",
        default=None,
        at_least=1,
    )
    vpp: int | None = flag(
        "--virtual-pipeline-model-parallel-size",
        "model chunks per pipeline rank",
        also="--num-virtual-stages-per-pipeline-rank",
        default=None,
        at_least=2,
    )
    layers_per_virtual_stage: int | None = flag(
        "--num-layers-per-virtual-pipeline-stage",
        "layers per model chunk, in place of the number of chunks",
        default=None,
        at_least=1,
    )
    sequence_parallel: bool = flag(
        "--sequence-parallel", "divide tokens among tensor-parallel ranks", default=False
    )
    recompute_granularity: str | None = flag(
        "--recompute-granularity",
        "recompute activations in the backward pass: of whole layers, or of --recompute-modules",
        default=None,
        choices=("full", "selective"),
    )
    recompute_method: str | None = flag(
        "--recompute-method",
        "the way in which full recomputation chooses layers",
        default=None,
        choices=("uniform", "block"),
        only_with="--recompute-granularity full",
    )
    recompute_num_layers: int | None = flag(
        "--recompute-num-layers",
        "layers per recomputed group (uniform), or recomputed layers (block)",
        default=None,
        at_least=1,
    )
    recompute_modules: list | None = flag(
        "--recompute-modules",
        f"modules to recompute: {', '.join(RECOMPUTABLE)} (default: core_attn)",
        default=None,
        nargs="+",
        only_with="--recompute-granularity selective",
    )
    use_distributed_optimizer: bool = flag(
        "--use-distributed-optimizer",
        "divide the optimizer's state among data-parallel ranks",
        default=False,
    )
    overlap_grad_reduce: bool = flag(
        "--overlap-grad-reduce", "reduce gradients during the backward pass", default=False
    )
    overlap_param_gather: bool = flag(
        "--overlap-param-gather",
        "gather weights during the forward pass",
        default=False,
        only_with="--use-distributed-optimizer --overlap-grad-reduce",
    )

    def data_parallel_size(self, world: int) -> int:
        return world // (self.tp * self.pp * self.cp)

    @property
    def end_stages(self) -> dict[str, int]:
        """{flag: layers} of the first and last pipeline stage, where they are given."""
        given = {
            "--decoder-first-pipeline-num-layers": self.first_stage_layers,
            "--decoder-last-pipeline-num-layers": self.last_stage_layers,
        }
        return {name: layers for name, layers in given.items() if layers is not None}

    def stage_layers(self, num_layers: int) -> list[int]:
        """Layers of each pipeline stage. The stages that are not given share the others."""
        others = self.pp - len(self.end_stages)
        rest = num_layers - sum(self.end_stages.values())
        stages = [-(-rest // others)] * self.pp if others else [0] * self.pp
        if self.first_stage_layers is not None:
            stages[0] = self.first_stage_layers
        if self.last_stage_layers is not None:
            stages[-1] = self.last_stage_layers
        return stages

    def problems(self) -> Iterator[str]:
        if self.vpp is not None and self.pp == 1:
            yield (
                f"--virtual-pipeline-model-parallel-size {self.vpp} needs a pipeline, and "
                "--pipeline-model-parallel-size is 1. Raise the second, or leave the first out."
            )
        given = " and ".join(f"{name} {layers}" for name, layers in self.end_stages.items())
        if given and self.pp == 1:
            yield (
                f"{given}: there is one pipeline stage only. Raise --pipeline-model-parallel-size, "
                "or leave it out."
            )
        if self.layers_per_virtual_stage is not None:
            name = f"--num-layers-per-virtual-pipeline-stage {self.layers_per_virtual_stage}"
            if self.pp == 1:
                yield (
                    f"{name} needs a pipeline, and --pipeline-model-parallel-size is 1. Raise the "
                    "second, or leave the first out."
                )
            elif self.vpp is not None:
                yield (
                    f"{name} and --virtual-pipeline-model-parallel-size {self.vpp} both divide the "
                    "pipeline ranks. Give one."
                )
            elif given:
                yield (
                    f"{name} is for stages of equal size, and {given} makes them differ. Give "
                    "--virtual-pipeline-model-parallel-size in place of the first."
                )
        if self.recompute_granularity == "full" and self.recompute_method is None:
            yield (
                "--recompute-granularity full needs a method. Add --recompute-method uniform "
                "--recompute-num-layers 1."
            )
        if self.recompute_method and self.recompute_num_layers is None:
            yield (
                f"--recompute-method {self.recompute_method} needs a number of layers. Add "
                "--recompute-num-layers 1."
            )
        unknown = [m for m in self.recompute_modules or () if m not in RECOMPUTABLE]
        if unknown:
            yield (
                f"--recompute-modules {' '.join(unknown)} is not known. Choose from "
                f"{', '.join(RECOMPUTABLE)}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(Section):
    """vLLM and its router.

    vllm_args, router_args  all other --vllm-* and --router-* flags, for the parsers of vLLM and of
                            its router: {"max_num_seqs": "8", "enforce_eager": True}
    """

    vllm_args: dict[str, Any] = field(default_factory=dict)
    router_args: dict[str, Any] = field(default_factory=dict)
    router_policy_asked: str | None = flag(
        "--vllm-router-policy",
        "the router's rule for choosing an engine (default: round_robin; sticky_least_loaded with "
        "--custom-generate-function-path, which may send several requests for a sample)",
        default=None,
    )
    router_ip: str | None = flag(
        "--vllm-router-ip", "address that the router binds (default: this node's)", default=None
    )
    router_port: int | None = flag(
        "--vllm-router-port",
        "port of the router (default: a free one)",
        default=None,
        at_least=1,
        at_most=65535,
    )
    request_timeout_s: float = flag(
        "--router-request-timeout-secs", "deadline of a request", default=14400.0, above=0
    )
    weight_transfer_timeout_s: float = flag(
        "--vllm-weight-transfer-timeout-sec",
        "deadline of a weight update",
        default=900.0,
        above=0,
    )
    start_timeout_s: float = flag(
        "--vllm-start-timeout-sec",
        "deadline for engines and trainer ranks to start",
        default=600.0,
        above=0,
    )
    fault_tolerance: bool = flag(
        "--use-fault-tolerance",
        "restart an engine that died, give it the trainer's weights, and repeat the failed work",
        default=False,
    )
    update_weight_buffer_size: int = flag(
        "--update-weight-buffer-size",
        "bytes of weights per bucket of an update",
        default=512 << 20,
        at_least=1,
    )
    update_weights_interval: int = flag(
        "--update-weights-interval",
        "update the engines' weights after every N rollouts",
        default=1,
        at_least=1,
    )
    check_weight_update_equal: bool = flag(
        "--check-weight-update-equal",
        "compare the checksum of every tensor after each update",
        default=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig(Section):
    run_dir: Path | None = flag(
        "--run-dir",
        "folder for metrics.jsonl and logs (default: --save, else runs/DATE-TIME)",
        default=None,
    )
    use_tensorboard: bool = flag("--use-tensorboard", "log to TensorBoard too", default=False)
    tb_dir: Path | None = flag(
        "--tb-dir", "folder for TensorBoard (default: RUN_DIR/tensorboard)", default=None
    )
    use_wandb: bool = flag("--use-wandb", "log to Weights & Biases too", default=False)
    wandb_project: str | None = flag("--wandb-project", default=None)
    wandb_group: str | None = flag("--wandb-group", default=None)
    progress: str = flag(
        "--progress",
        "rich: a live line; plain: one line per step; auto: rich on a terminal",
        default="auto",
        choices=("auto", "rich", "plain", "none"),
    )
    timeline: bool = flag(
        "--timeline",
        "record when engines, trainer ranks, graders and the manager work, and on what: "
        "RUN_DIR/timeline.json for Perfetto, and timeline.png",
        default=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DebugConfig(Section):
    train_only: bool = flag(
        "--debug-train-only",
        "start no engines; the rollout function reads its data itself",
        default=False,
    )
    rollout_only: bool = flag(
        "--debug-rollout-only",
        "start no trainer; engines keep the weights of --hf-checkpoint",
        default=False,
    )
    save_rollout_data: Path | None = flag(
        "--save-debug-rollout-data",
        "write each rollout to a file: 'dir/{rollout_id}.pt'",
        default=None,
        fills=(0, 1, "eval_0"),
    )
    load_rollout_data: Path | None = flag(
        "--load-debug-rollout-data",
        "start no engines; train on the files of --save-debug-rollout-data",
        default=None,
        fills=(0, 1),
    )
    dry_run: bool = flag(
        "--dry-run",
        "print the resolved configuration, the batch arithmetic and a memory estimate, then exit",
        default=False,
    )
    plan_gpu_gib: float | None = flag(
        "--plan-gpu-memory",
        "plan for GPUs with this many GiB instead of this machine's GPUs",
        default=None,
        above=0,
        only_with="--dry-run",
    )

    def problems(self) -> Iterator[str]:
        if self.train_only and self.rollout_only:
            yield "--debug-train-only and --debug-rollout-only leave nothing to run. Give one."
        if self.rollout_only and self.load_rollout_data is not None:
            yield (
                f"--load-debug-rollout-data {self.load_rollout_data} is for training, and "
                "--debug-rollout-only does not train. Drop one of the two."
            )

    @property
    def needs_no_data_state(self) -> bool:
        """Whether a run may begin at any rollout, without the data state of the previous one."""
        return self.rollout_only or self.load_rollout_data is not None

    @property
    def no_engines(self) -> bool:
        return self.train_only or self.load_rollout_data is not None

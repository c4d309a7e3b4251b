"""The sections of a configuration, one frozen dataclass each. Every field names its flag.

A section checks what it alone can know in `__post_init__`; rules across sections are in `rules.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vime.config.evaluation import read_eval_config
from vime.config.fields import Section, flag
from vime.errors import ConfigError

Path = str


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
        if self.actor_gpus_per_node > self.gpus_per_node:
            yield (
                f"--actor-num-gpus-per-node {self.actor_gpus_per_node} is more than --num-gpus-per-node {self.gpus_per_node}. "
                "Lower the first, or raise the second to what a node has."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(Section):
    """Which model. The architecture is read from `config.json`; MODEL_ARGS are compared with it."""

    hf_checkpoint: Path = flag(
        "--hf-checkpoint", "HF folder: config, tokenizer, weights; vLLM starts from it"
    )
    override: bool = flag(
        "--override-model-config", "let MODEL_ARGS win over config.json", default=False
    )
    args: dict[str, Any] = field(
        default_factory=dict
    )  # MODEL_ARGS as given: {Megatron flag dest: value}
    dtype: str = flag(
        "--dtype",
        "float32 or bfloat16, for trainer and engines (default: bfloat16 on CUDA, float32 on CPU)",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
    )


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
        if self.overlap_param_gather and not self.use_distributed_optimizer:
            yield "--overlap-param-gather has nothing to gather. Add --use-distributed-optimizer, or leave it out."
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            yield "--overlap-param-gather needs --overlap-grad-reduce. Add it, or leave both out."


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig(Section):
    optimizer: str = flag("--optimizer", default="adam", choices=("adam", "sgd"))
    lr: float = flag("--lr", "peak learning rate", default=1e-6, at_least=0)
    min_lr: float = flag("--min-lr", default=0.0, at_least=0)
    lr_decay_style: str = flag(
        "--lr-decay-style",
        default="constant",
        choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    )
    lr_decay_iters: int | None = flag(
        "--lr-decay-iters", "steps of the decay (default: the whole run)", default=None, at_least=1
    )
    lr_warmup_iters: int = flag(
        "--lr-warmup-iters", "optimizer steps of linear warm-up", default=0, at_least=0
    )
    lr_warmup_fraction: float | None = flag(
        "--lr-warmup-fraction", default=None, at_least=0, at_most=1
    )
    weight_decay: float = flag("--weight-decay", default=0.01, at_least=0)
    beta1: float = flag("--adam-beta1", default=0.9, at_least=0, at_most=1)
    beta2: float = flag("--adam-beta2", default=0.999, at_least=0, at_most=1)
    eps: float = flag("--adam-eps", default=1e-8, above=0)
    clip_grad: float = flag(
        "--clip-grad", "largest gradient norm; 0 = no clipping", default=1.0, at_least=0
    )
    accumulate_fp32: bool = flag(
        "--accumulate-allreduce-grads-in-fp32",
        default=True,
        negated="--no-accumulate-allreduce-grads-in-fp32",
    )
    freeze_names: list | None = flag(
        "--freeze-params-name-list",
        "regular expressions: weights whose Megatron name has a match do not train",
        default=None,
        nargs="+",
    )
    train_names: list | None = flag(
        "--only-train-params-name-list",
        "regular expressions: only weights whose Megatron name has a match train",
        default=None,
        nargs="+",
    )

    def problems(self) -> Iterator[str]:
        if self.min_lr > self.lr:
            yield f"--min-lr {self.min_lr} is above --lr {self.lr}. Lower it."
        if self.lr_warmup_fraction is not None and self.lr_warmup_iters:
            yield f"--lr-warmup-fraction {self.lr_warmup_fraction} and --lr-warmup-iters {self.lr_warmup_iters} both set the warm-up. Give one."
        if self.freeze_names and self.train_names:
            yield f"--freeze-params-name-list {' '.join(self.freeze_names)} and --only-train-params-name-list {' '.join(self.train_names)} exclude each other. Give one."
        for name, patterns in (
            ("--freeze-params-name-list", self.freeze_names),
            ("--only-train-params-name-list", self.train_names),
        ):
            for pattern in patterns or []:
                try:
                    re.compile(pattern)
                except re.error as error:
                    yield f"{name} {pattern} is not a regular expression ({error}). Correct it."


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig(Section):
    prompt_data: Path | None = flag(
        "--prompt-data", "prompts: .jsonl or .parquet, with an optional @[a:b] slice", default=None
    )
    input_key: str = flag(
        "--input-key", "field that holds the prompt: a string or OpenAI messages", default="input"
    )
    label_key: str | None = flag(
        "--label-key", "field that holds the label for the grader", default=None
    )
    metadata_key: str = flag(
        "--metadata-key", "field that holds a dict for Sample.metadata", default="metadata"
    )
    tool_key: str = flag(
        "--tool-key", "field that holds tool definitions for the chat template", default="tools"
    )
    apply_chat_template: bool = flag(
        "--apply-chat-template", "run tokenizer.apply_chat_template on messages", default=False
    )
    apply_chat_template_kwargs: dict = flag(
        "--apply-chat-template-kwargs",
        "JSON passed to apply_chat_template",
        default={},
        type=json.loads,
    )
    shuffle: bool = flag("--rollout-shuffle", "shuffle the prompts, anew each epoch", default=False)
    seed: int = flag("--rollout-seed", "seed of the shuffle and of per-sample seeds", default=42)
    global_dataset: bool = flag(
        "--rollout-global-dataset",
        "read --prompt-data",
        default=True,
        negated="--disable-rollout-global-dataset",
    )
    data_source_path: str = flag(
        "--data-source-path",
        "class that hands out prompts",
        default="vime.rollout.data_source.RolloutDataSourceWithBuffer",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig(Section):
    """Prompts, samples and steps. A rollout has prompts x samples_per_prompt samples."""

    prompts: int = flag("--rollout-batch-size", "prompts in one rollout", at_least=1)
    samples_per_prompt: int = flag(
        "--n-samples-per-prompt", "responses per prompt", default=1, at_least=1
    )
    num_rollout: int | None = flag("--num-rollout", "rollouts to train", default=None, at_least=1)
    num_epoch: int | None = flag(
        "--num-epoch",
        "passes over the prompts, in place of --num-rollout",
        default=None,
        at_least=1,
    )
    start_rollout_id: int | None = flag(
        "--start-rollout-id",
        "first rollout (default: where the checkpoint stopped)",
        default=None,
        at_least=0,
    )
    steps_asked: int | None = flag(
        "--num-steps-per-rollout", "optimizer steps per rollout", default=None, at_least=1
    )
    global_batch_size: int | None = flag(
        "--global-batch-size",
        "samples per optimizer step, in place of --num-steps-per-rollout",
        default=None,
        at_least=1,
    )
    micro_batch_size: int = flag(
        "--micro-batch-size",
        "sequences per micro-batch; ignored under --use-dynamic-batch-size",
        default=1,
        at_least=1,
    )
    dynamic: bool = flag(
        "--use-dynamic-batch-size", "pack sequences up to --max-tokens-per-gpu", default=False
    )
    max_tokens_per_gpu: int | None = flag(
        "--max-tokens-per-gpu",
        "tokens of one packed micro-batch, per GPU",
        default=None,
        at_least=1,
    )
    log_probs_max_tokens_per_gpu: int | None = flag(
        "--log-probs-max-tokens-per-gpu",
        "the same for forward-only passes (default: --max-tokens-per-gpu)",
        default=None,
        at_least=1,
    )
    balance: bool = flag(
        "--balance-data", "even out the work of data-parallel ranks", default=False
    )
    balance_by_flops: bool = flag(
        "--balance-by-flops",
        "the same, by the model's own share of attention, from config.json",
        default=False,
    )

    @property
    def samples(self) -> int:
        return self.prompts * self.samples_per_prompt

    @property
    def steps_per_rollout(self) -> int:
        if self.steps_asked is not None:
            return self.steps_asked
        if self.global_batch_size is not None:
            return max(1, self.samples // self.global_batch_size)
        return 1

    def rollouts(self, num_prompts: int) -> int:
        """Rollouts of the run: --num-rollout, or what fits whole into --num-epoch passes over `num_prompts` prompts."""
        if self.num_rollout is not None:
            return self.num_rollout
        epochs = self.num_epoch or 0
        if epochs * num_prompts < self.prompts:
            raise ConfigError(
                f"--num-epoch {epochs} over {num_prompts} prompts is less than one rollout of --rollout-batch-size {self.prompts}. Raise the first or lower the second."
            )
        return epochs * num_prompts // self.prompts

    def problems(self) -> Iterator[str]:
        product = f"{self.samples} samples ({self.prompts} prompts x {self.samples_per_prompt})"
        steps, size = self.steps_asked, self.global_batch_size
        if steps is not None and self.samples % steps:
            yield f"--num-steps-per-rollout {steps} does not divide {product}. Lower it or change --rollout-batch-size."
        elif steps is not None and size is not None and steps * size != self.samples:
            yield (
                f"--global-batch-size {size} x --num-steps-per-rollout {steps} is not {product}. "
                f"Give --global-batch-size {self.samples // steps}, or only one of the two."
            )
        elif steps is None and size is not None and self.samples % size:
            yield f"--global-batch-size {size} does not divide {product}. Give a divisor, or --num-steps-per-rollout in its place."
        if self.dynamic and self.max_tokens_per_gpu is None:
            yield "--use-dynamic-batch-size needs the size of a pack. Add --max-tokens-per-gpu, for example 9216."
        if self.num_rollout is not None and self.num_epoch is not None:
            yield f"--num-rollout {self.num_rollout} and --num-epoch {self.num_epoch} both set the length of the run. Give one."


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig(Section):
    """How responses are sampled. What `EvalConfig` leaves unset is inherited from here."""

    function_path: str = flag(
        "--rollout-function-path",
        "generates one rollout",
        default="vime.rollout.vllm_rollout.generate_rollout",
    )
    temperature: float = flag("--rollout-temperature", default=1.0, at_least=0)
    top_p: float = flag("--rollout-top-p", default=1.0, above=0, at_most=1)
    top_k: int = flag("--rollout-top-k", default=-1, at_least=-1)
    max_response_len: int = flag(
        "--rollout-max-response-len", "tokens of a response", default=1024, at_least=1
    )
    max_prompt_len: int | None = flag(
        "--rollout-max-prompt-len",
        "longer prompts are dropped, and counted",
        default=None,
        at_least=1,
    )
    max_context_len: int | None = flag(
        "--rollout-max-context-len", "tokens of prompt and response", default=None, at_least=1
    )
    stop: list | None = flag("--rollout-stop", "stop strings", default=None, nargs="+")
    stop_token_ids: list | None = flag(
        "--rollout-stop-token-ids", default=None, nargs="+", type=int
    )
    skip_special_tokens: bool = flag(
        "--rollout-skip-special-tokens",
        "leave special tokens out of Sample.response",
        default=False,
    )
    over_sampling: int | None = flag(
        "--over-sampling-batch-size",
        "prompts submitted at a time (default: --rollout-batch-size)",
        default=None,
        at_least=1,
    )
    dynamic_filter_path: str | None = flag(
        "--dynamic-sampling-filter-path", "keeps or drops a finished group", default=None
    )
    partial: bool = flag(
        "--partial-rollout",
        "keep aborted samples and continue them in the next rollout",
        default=False,
    )
    mask_offpolicy: bool = flag(
        "--mask-offpolicy-in-partial-rollout",
        "no loss on tokens of an earlier rollout",
        default=False,
    )
    max_staleness: int | None = flag(
        "--rollout-max-staleness",
        "buffered groups begun more rollouts ago start over (default: never)",
        default=None,
    )
    buffer_filter_path: str | None = flag(
        "--buffer-filter-path",
        "takes groups out of the buffer (default: first in, first out)",
        default=None,
    )
    sample_filter_path: str | None = flag(
        "--rollout-sample-filter-path",
        "f(args, groups): sets remove_sample on samples that get no loss",
        default=None,
    )
    all_samples_path: str | None = flag(
        "--rollout-all-samples-process-path",
        "f(args, samples, data_source): sees every group that was taken, dropped ones too",
        default=None,
    )
    deterministic: bool = flag(
        "--vllm-enable-deterministic-inference",
        "a seed for each sample (--rollout-seed + its index): the same weights give the same samples",
        default=False,
    )
    custom_generate_path: str | None = flag(
        "--custom-generate-function-path",
        "async f(args, sample, sampling_params): generates one sample",
        default=None,
    )
    sample_hook_paths: list | None = flag(
        "--rollout-sample-hook-path",
        "f(args, sample): sees each finished sample, may replace it; give several, or repeat the flag",
        default=None,
        nargs="+",
        repeats=True,
    )
    log_path: str | None = flag(
        "--custom-rollout-log-function-path",
        "f(rollout_id, args, samples, metrics, rollout_time): True skips the default metrics",
        default=None,
    )
    convert_path: str | None = flag(
        "--custom-convert-samples-to-train-data-path",
        "f(args, samples): a TrainBatch, or a dict of columns",
        default=None,
    )
    data_postprocess_path: str | None = flag(
        "--rollout-data-postprocess-path",
        "f(args, rollout_id, batch): changes the TrainBatch, or returns another",
        default=None,
    )
    concurrency: int = flag(
        "--vllm-server-concurrency", "requests in flight per engine", default=512, at_least=1
    )

    def problems(self) -> Iterator[str]:
        if (
            self.max_context_len is not None
            and self.max_prompt_len is not None
            and self.max_prompt_len >= self.max_context_len
        ):
            yield (
                f"--rollout-max-prompt-len {self.max_prompt_len} leaves no room in --rollout-max-context-len {self.max_context_len}. "
                "Lower the first or raise the second."
            )
        if self.mask_offpolicy and not self.partial:
            yield "--mask-offpolicy-in-partial-rollout acts only on partial rollouts. Add --partial-rollout, or leave it out."


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig(Section):
    rm_type: str | None = flag("--rm-type", "the grader", default=None)
    custom_rm_path: str | None = flag(
        "--custom-rm-path", "async f(args, sample) -> reward", default=None
    )
    post_process_path: str | None = flag(
        "--custom-reward-post-process-path",
        "f(args, samples) -> (raw rewards, scores), in place of the estimator's normalisation",
        default=None,
    )
    group_rm: bool = flag(
        "--group-rm", "grade a group at a time: f(args, samples) -> list", default=False
    )
    rm_url: str | None = flag("--rm-url", "server of --rm-type remote_rm", default=None)
    reward_key: str | None = flag(
        "--reward-key", "which entry of a dict reward to train on", default=None
    )
    workers: int = flag("--rm-num-workers", "grader processes", default=1, at_least=1)
    timeout_s: float = flag(
        "--rm-timeout-secs", "deadline for grading one answer", default=10.0, above=0
    )

    def problems(self) -> Iterator[str]:
        if self.rm_type and self.rm_type.removeprefix("boxed_") == "remote_rm" and not self.rm_url:
            yield f"--rm-type {self.rm_type} needs a server. Add --rm-url http://HOST:PORT/PATH."
        if self.group_rm and not self.custom_rm_path:
            yield "--group-rm grades with a function of yours. Add --custom-rm-path, or leave it out."


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig(Section):
    interval: int | None = flag(
        "--eval-interval", "evaluate every so many rollouts", default=None, at_least=1
    )
    prompt_data: list | None = flag(
        "--eval-prompt-data",
        "name path pairs, or one bare path (named aime)",
        default=None,
        nargs="+",
    )
    config: dict | None = flag(
        "--eval-config",
        "YAML of several data sets, in place of --eval-prompt-data: eval.defaults, eval.datasets",
        default=None,
        type=read_eval_config,
    )
    samples_per_prompt: int = flag("--n-samples-per-eval-prompt", default=1, at_least=1)
    max_response_len: int | None = flag("--eval-max-response-len", default=None, at_least=1)
    temperature: float | None = flag("--eval-temperature", default=None, at_least=0)
    top_p: float | None = flag("--eval-top-p", default=None, above=0, at_most=1)
    top_k: int | None = flag("--eval-top-k", default=None, at_least=-1)
    max_prompt_len: int | None = flag("--eval-max-prompt-len", default=None, at_least=1)
    max_context_len: int | None = flag("--eval-max-context-len", default=None, at_least=1)
    min_new_tokens: int | None = flag(
        "--eval-min-new-tokens", "no response ends before", default=None, at_least=0
    )
    input_key: str | None = flag("--eval-input-key", default=None)
    label_key: str | None = flag("--eval-label-key", default=None)
    tool_key: str | None = flag("--eval-tool-key", default=None)
    function_path: str | None = flag(
        "--eval-function-path",
        "default: --rollout-function-path with evaluation=True",
        default=None,
    )
    log_path: str | None = flag(
        "--custom-eval-rollout-log-function-path",
        "f(rollout_id, args, data, metrics): True skips the default metrics",
        default=None,
    )
    reward_key: str | None = flag("--eval-reward-key", default=None)
    skip_before_train: bool = flag("--skip-eval-before-train", default=False)

    def due_before_train(self, start_step: int) -> bool:
        """A new run is evaluated once before its first step."""
        return self.interval is not None and start_step == 0 and not self.skip_before_train

    @property
    def datasets(self) -> dict[str, Path]:
        """{name: path}. One bare path is named "aime". `eval_datasets(cfg)` has the rest."""
        if self.config is not None:
            return {data["name"]: data["path"] for data in self.config["datasets"]}
        data = self.prompt_data or []
        return (
            {"aime": data[0]} if len(data) == 1 else dict(zip(data[::2], data[1::2], strict=False))
        )

    def problems(self) -> Iterator[str]:
        data = self.prompt_data or []
        if len(data) > 1 and len(data) % 2:
            yield f"--eval-prompt-data {' '.join(data)} is not pairs of name and path. Give NAME PATH [NAME PATH ...], or one bare path."
        names = data[::2] if len(data) > 1 else []
        if len(set(names)) < len(names):
            yield f"--eval-prompt-data {' '.join(data)} uses a name twice. Name each data set differently."
        if self.interval is not None and not data and self.config is None:
            yield f"--eval-interval {self.interval} has nothing to evaluate. Add --eval-prompt-data NAME PATH, or leave it out."
        if data and self.config is not None:
            yield f"--eval-prompt-data {' '.join(data)} and --eval-config both name data sets. Move them all into the file, or drop it."


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig(Section):
    load: Path | None = flag(
        "--load", "checkpoint of the actor to continue; empty or missing: --ref-load", default=None
    )
    ref_load: Path | None = flag(
        "--ref-load", "checkpoint of the reference model, and where a new run starts", default=None
    )
    save: Path | None = flag("--save", "where checkpoints go", default=None)
    save_interval: int | None = flag(
        "--save-interval", "save every so many rollouts", default=None, at_least=1
    )
    save_hf: str | None = flag(
        "--save-hf", "also export HF folders: 'dir/{rollout_id}'", default=None
    )
    keep_last: int | None = flag(
        "--keep-last",
        "keep so many checkpoints under --save and delete older ones (default: all)",
        default=None,
        at_least=1,
    )
    save_optim: bool = flag(
        "--save-optim", "save the optimizer state", default=True, negated="--no-save-optim"
    )
    load_optim: bool = flag("--load-optim", default=True, negated="--no-load-optim")
    ckpt_step: int | None = flag(
        "--ckpt-step", "load this iteration, not the latest", default=None, at_least=0
    )
    ref_ckpt_step: int | None = flag("--ref-ckpt-step", default=None, at_least=0)

    def problems(self) -> Iterator[str]:
        if self.save_interval is not None and self.save is None and self.save_hf is None:
            yield f"--save-interval {self.save_interval} has nowhere to save. Add --save FOLDER."
        if self.save_hf is not None and "{rollout_id}" not in self.save_hf:
            yield f"--save-hf {self.save_hf} would write every export to one folder. Put {{rollout_id}} into the name."


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgorithmConfig(Section):
    loss_type: str = flag("--loss-type", default="policy_loss", choices=("policy_loss", "sft_loss"))
    advantage_estimator: str = flag(
        "--advantage-estimator",
        default="grpo",
        choices=(
            "grpo",
            "gspo",
            "cispo",
            "dr_grpo",
            "rloo",
            "reinforce_plus_plus",
            "reinforce_plus_plus_baseline",
        ),
    )
    use_kl_loss: bool = flag(
        "--use-kl-loss", "KL to the reference model as a loss; also logs it", default=False
    )
    kl_loss_coef: float = flag("--kl-loss-coef", default=0.0, at_least=0)
    kl_loss_type: str = flag(
        "--kl-loss-type", default="k1", choices=("k1", "k2", "k3", "low_var_kl")
    )
    unbiased_kl: bool = flag(
        "--use-unbiased-kl", "the KL loss times the ratio of new and old policy", default=False
    )
    kl_coef: float = flag(
        "--kl-coef", "KL to the reference model as a penalty on the reward", default=0.0, at_least=0
    )
    entropy_coef: float = flag("--entropy-coef", default=0.0)
    clip_low: float = flag("--eps-clip", default=0.2, at_least=0)
    clip_high_asked: float | None = flag(
        "--eps-clip-high", "default: --eps-clip", default=None, at_least=0
    )
    dual_clip: float | None = flag(
        "--eps-clip-c", "dual clip's constant, above 1", default=None, above=1
    )
    gamma: float = flag("--gamma", default=1.0, at_least=0, at_most=1)
    per_token_loss: bool = flag(
        "--calculate-per-token-loss",
        "mean over the step's tokens, not over samples of token means",
        default=False,
    )
    normalize_advantages: bool = flag(
        "--normalize-advantages", "whiten over the step", default=False
    )
    grpo_std: bool = flag(
        "--grpo-std-normalization", default=True, negated="--disable-grpo-std-normalization"
    )
    normalize_rewards: bool = flag(
        "--rewards-normalization", default=True, negated="--disable-rewards-normalization"
    )
    overlong_buffer_len: int | None = flag(
        "--overlong-buffer-len",
        "a response that enters the last so many tokens of --rollout-max-response-len loses reward, linearly (DAPO)",
        default=None,
        at_least=1,
    )
    overlong_penalty: float = flag(
        "--overlong-penalty-factor", "what a response of full length loses", default=1.0, above=0
    )
    use_rollout_logprobs: bool = flag(
        "--use-rollout-logprobs",
        "the old policy is the engine's: the ratio starts from the log-probabilities that sampling returned",
        default=False,
    )
    use_tis: bool = flag(
        "--use-tis",
        "weigh each token's loss by trainer's over engine's probability (truncated importance sampling)",
        default=False,
    )
    tis_clip: float = flag("--tis-clip", "largest weight", default=2.0, above=0)
    tis_clip_low: float = flag("--tis-clip-low", "smallest weight", default=0.0, at_least=0)
    tis_level: str = flag(
        "--tis-level",
        "the weight is of a token, of its sequence (product), or geometric (the sequence's mean)",
        default="token",
        choices=("token", "sequence", "geometric"),
    )
    tis_mode: str = flag(
        "--tis-mode",
        "beyond the bounds: clip to them, or mask (on tokens: IcePop)",
        default="clip",
        choices=("clip", "mask"),
    )
    custom_tis_path: str | None = flag(
        "--custom-tis-function-path",
        "f(args, *, pg_loss, train_log_probs, rollout_log_probs, sequence_sum) -> (pg_loss, stats), in place of the --tis-* weights",
        default=None,
    )
    custom_loss_path: str | None = flag(
        "--custom-loss-function-path",
        "f(args, logp_T, *, ...) -> (loss per token, stats), in place of the whole policy loss",
        default=None,
    )
    custom_advantage_path: str | None = flag(
        "--custom-advantage-function-path",
        "f(args, sequences, old_logp, ref_logp) -> an advantage per token, in place of the estimator's",
        default=None,
    )
    custom_reducer_path: str | None = flag(
        "--custom-pg-loss-reducer-function-path",
        "f(args, loss_masks, per_token) -> each token's weight in its step's loss",
        default=None,
    )
    ref_update_interval: int | None = flag(
        "--ref-update-interval",
        "the reference becomes the actor after every so many rollouts (default: never)",
        default=None,
        at_least=1,
    )
    use_opsm: bool = flag(
        "--use-opsm",
        "no loss on sequences with a negative advantage that the policy has left",
        default=False,
    )
    opsm_delta: float = flag(
        "--opsm-delta",
        "left: the mean of old - new log-probability is above this",
        default=1e-4,
        at_least=0,
    )
    mismatch_metrics: bool = flag(
        "--get-mismatch-metrics",
        "train/mismatch_*: how far trainer and engine are apart",
        default=False,
    )
    seed: int = flag("--seed", default=1234)

    @property
    def needs_rollout_logp(self) -> str | None:
        """The flag that cannot do without the engine's log-probabilities, if any."""
        if self.loss_type != "policy_loss":
            return None
        asked = {
            "--use-rollout-logprobs": self.use_rollout_logprobs,
            "--use-tis": self.use_tis,
            "--get-mismatch-metrics": self.mismatch_metrics,
        }
        return next((name for name, wanted in asked.items() if wanted), None)

    @property
    def clip_high(self) -> float:
        return self.clip_low if self.clip_high_asked is None else self.clip_high_asked

    @property
    def needs_reference(self) -> bool:
        return self.loss_type == "policy_loss" and (self.use_kl_loss or self.kl_coef != 0.0)

    def problems(self) -> Iterator[str]:
        if self.kl_coef and self.kl_loss_coef:
            yield (
                f"--kl-coef {self.kl_coef} and --kl-loss-coef {self.kl_loss_coef} exclude each other: "
                "the first is a penalty on the reward, the second a loss. Set one to 0."
            )
        if self.kl_loss_coef and not self.use_kl_loss:
            yield f"--kl-loss-coef {self.kl_loss_coef} has no effect without --use-kl-loss. Add that, or set the coefficient to 0."
        if self.unbiased_kl and not self.use_kl_loss:
            yield "--use-unbiased-kl has no effect without --use-kl-loss. Add that, or leave it out."
        if self.use_tis and self.use_rollout_logprobs:
            yield "--use-tis weighs by the trainer's over the engine's old policy, and --use-rollout-logprobs makes them one. Drop one of the two."
        if self.tis_clip_low > self.tis_clip:
            yield f"--tis-clip-low {self.tis_clip_low} is above --tis-clip {self.tis_clip}. Lower it."
        if not self.use_tis and (
            self.tis_clip,
            self.tis_clip_low,
            self.tis_level,
            self.tis_mode,
        ) != (2.0, 0.0, "token", "clip"):
            yield f"--tis-clip {self.tis_clip}, --tis-clip-low {self.tis_clip_low}, --tis-level {self.tis_level}, --tis-mode {self.tis_mode} have no effect without --use-tis. Add that, or leave them out."
        if self.advantage_estimator == "dr_grpo" and self.per_token_loss:
            yield "--calculate-per-token-loss divides by the response tokens, and --advantage-estimator dr_grpo by a constant. Drop one of the two."
        hooks = {
            "--custom-loss-function-path": self.custom_loss_path,
            "--custom-advantage-function-path": self.custom_advantage_path,
        }
        for name, path in hooks.items():
            if path is not None and self.loss_type != "policy_loss":
                yield f"{name} {path} has no part in --loss-type {self.loss_type}. Leave out one of the two."
        if self.custom_loss_path is not None and (self.use_tis or self.use_opsm):
            yield f"--custom-loss-function-path {self.custom_loss_path} takes the place of --use-tis and --use-opsm. Drop them, or the function."
        if self.custom_advantage_path is not None and self.kl_coef:
            yield f"--custom-advantage-function-path {self.custom_advantage_path} takes the place of --kl-coef {self.kl_coef}. Drop one of the two; the function is given both log-probabilities."
        if self.custom_tis_path is not None and not self.use_tis:
            yield f"--custom-tis-function-path {self.custom_tis_path} has no effect without --use-tis. Add that, or leave it out."
        if self.custom_reducer_path is not None and self.advantage_estimator == "dr_grpo":
            yield f"--custom-pg-loss-reducer-function-path {self.custom_reducer_path} and --advantage-estimator dr_grpo both set the weights. Drop one of the two."
        if self.ref_update_interval is not None and not self.needs_reference:
            yield f"--ref-update-interval {self.ref_update_interval} has no reference to update. Add --use-kl-loss or --kl-coef, or leave it out."
        if self.overlong_buffer_len is None and self.overlong_penalty != 1.0:
            yield f"--overlong-penalty-factor {self.overlong_penalty} has no effect without --overlong-buffer-len. Add that, or leave it out."


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(Section):
    """vLLM and its router. `vllm_args` holds every other --vllm-* flag as given, for the engine's own parser."""

    vllm_args: dict[str, Any] = field(default_factory=dict)
    router_policy: str = flag("--vllm-router-policy", default="round_robin")
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
    update_weight_buffer_size: int = flag(
        "--update-weight-buffer-size",
        "bytes of one bucket of weights",
        default=512 << 20,
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
        "print the resolved configuration and the batch arithmetic, then exit",
        default=False,
    )

    def problems(self) -> Iterator[str]:
        if self.train_only and self.rollout_only:
            yield "--debug-train-only and --debug-rollout-only leave nothing to run. Give one."
        if self.rollout_only and self.load_rollout_data is not None:
            yield f"--load-debug-rollout-data {self.load_rollout_data} is for training, and --debug-rollout-only trains nothing. Drop one of the two."
        for name, path in (
            ("--save-debug-rollout-data", self.save_rollout_data),
            ("--load-debug-rollout-data", self.load_rollout_data),
        ):
            if path is not None and "{rollout_id}" not in path:
                yield f"{name} {path} names one file for all rollouts. Put {{rollout_id}} into it, as in 'debug/{{rollout_id}}.pt'."

    @property
    def no_engines(self) -> bool:
        return self.train_only or self.load_rollout_data is not None

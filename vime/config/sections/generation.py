"""From prompts to graded samples: data, batch, sampling, rewards, evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from vime.config.evaluation import read_eval_config
from vime.config.fields import Path, Section, flag
from vime.errors import ConfigError
from vime.plugins.batch import CONVERT, DATA_POSTPROCESS, EVAL_LOG, LOG, POST_PROCESS
from vime.plugins.rollout import (
    ALL_SAMPLES,
    BUFFER_FILTER,
    DATA_SOURCE,
    DYNAMIC_FILTER,
    GENERATE,
    GROUP_REWARD,
    REWARD,
    ROLLOUT,
    SAMPLE_FILTER,
    SAMPLE_HOOK,
)
from vime.rollout.rm_hub.registry import GRADERS, problems_of


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
        hook=DATA_SOURCE,
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
    log_probs_chunk_asked: int = flag(
        "--log-probs-chunk-size",
        "log-probabilities in PyTorch take so many tokens at a time; -1: what makes 64 MiB of float32 logits",
        default=-1,
        at_least=-1,
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

    @property
    def log_probs_chunk(self) -> int | None:
        """Tokens whose float32 logits exist at a time; None: as many as take 64 MiB."""
        return None if self.log_probs_chunk_asked == -1 else self.log_probs_chunk_asked

    def problems(self) -> Iterator[str]:
        if self.log_probs_chunk_asked == 0:
            yield "--log-probs-chunk-size 0 takes no token at a time. Give 1 or more, or -1 to have it chosen."
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
        hook=ROLLOUT,
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
        "--dynamic-sampling-filter-path",
        "keeps or drops a finished group",
        default=None,
        hook=DYNAMIC_FILTER,
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
    buffer_filter_path: str = flag(
        "--buffer-filter-path",
        "takes groups out of the buffer of unfinished ones",
        default="vime.rollout.buffer.pop_first",
        hook=BUFFER_FILTER,
    )
    sample_filter_path: str | None = flag(
        "--rollout-sample-filter-path",
        "sets remove_sample on samples that get no loss",
        default=None,
        hook=SAMPLE_FILTER,
    )
    all_samples_path: str | None = flag(
        "--rollout-all-samples-process-path",
        "sees every sample that was taken, also of dropped groups",
        default=None,
        hook=ALL_SAMPLES,
    )
    deterministic: bool = flag(
        "--vllm-enable-deterministic-inference",
        "a seed for each sample (--rollout-seed + its index): the same weights give the same samples",
        default=False,
    )
    custom_generate_path: str | None = flag(
        "--custom-generate-function-path", "generates one sample", default=None, hook=GENERATE
    )
    sample_hook_paths: list | None = flag(
        "--rollout-sample-hook-path",
        "sees each finished sample and may replace it; takes several paths, or repeat the flag",
        default=None,
        nargs="+",
        repeats=True,
        hook=SAMPLE_HOOK,
    )
    log_path: str | None = flag(
        "--custom-rollout-log-function-path",
        "changes what is logged of a rollout",
        default=None,
        hook=LOG,
    )
    convert_path: str | None = flag(
        "--custom-convert-samples-to-train-data-path",
        "makes the training data from the samples",
        default=None,
        hook=CONVERT,
    )
    data_postprocess_path: str | None = flag(
        "--rollout-data-postprocess-path",
        "changes or replaces the batch before training",
        default=None,
        hook=DATA_POSTPROCESS,
    )
    custom_config_path: str | None = flag(
        "--custom-config-path",
        "YAML of names and values of your own, which functions read as args.NAME",
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
    rm_type: str | None = flag(
        "--rm-type",
        f"the grader: {', '.join(GRADERS)}; boxed_ in front: only the last box is graded",
        default=None,
    )
    custom_rm_path: str | None = flag(
        "--custom-rm-path",
        "grades a sample",
        default=None,
        hook=REWARD,
        hook_if={"group_rm": GROUP_REWARD},
    )
    post_process_path: str | None = flag(
        "--custom-reward-post-process-path",
        "computes rewards and scores in place of the normalisation of --advantage-estimator",
        default=None,
        hook=POST_PROCESS,
    )
    group_rm: bool = flag(
        "--group-rm",
        f"--custom-rm-path grades a group at a time: {GROUP_REWARD.shape}",
        default=False,
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
        yield from problems_of("--rm-type", self.rm_type, self.reward_key, self.rm_url)
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
        hook=ROLLOUT,
    )
    log_path: str | None = flag(
        "--custom-eval-rollout-log-function-path",
        "changes what is logged of an evaluation",
        default=None,
        hook=EVAL_LOG,
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

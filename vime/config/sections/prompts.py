"""The prompts of a rollout, and how its samples divide into optimizer steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vime.config.fields import Path, Section, flag, json_object
from vime.errors import ConfigError
from vime.plugins.rollout import DATA_SOURCE

DATA_SOURCE_PATH = "vime.rollout.data_source.RolloutDataSourceWithBuffer"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig(Section):
    prompt_data: Path | None = flag(
        "--prompt-data", "file of prompts: .jsonl or .parquet; @[a:b] takes a slice", default=None
    )
    input_key: str = flag(
        "--input-key", "field with the prompt: a string or OpenAI messages", default="input"
    )
    label_key: str | None = flag("--label-key", "field with the label for the grader", default=None)
    metadata_key: str = flag(
        "--metadata-key",
        "field with a dict for Sample.metadata",
        default="metadata",
        per_dataset=True,
    )
    tool_key: str = flag(
        "--tool-key", "field with tool definitions for the chat template", default="tools"
    )
    apply_chat_template: bool = flag(
        "--apply-chat-template",
        "turn messages into text with the tokenizer's chat template",
        default=False,
        per_dataset=True,
    )
    apply_chat_template_kwargs: dict = flag(
        "--apply-chat-template-kwargs",
        "JSON object with further arguments for the chat template",
        default={},
        type=json_object,
        per_dataset=True,
    )
    shuffle: bool = flag("--rollout-shuffle", "shuffle the prompts in every epoch", default=False)
    seed: int = flag("--rollout-seed", "seed of the shuffle and of samples", default=42)
    global_dataset: bool = flag(
        "--rollout-global-dataset",
        "read --prompt-data",
        default=True,
        negated="--disable-rollout-global-dataset",
    )
    data_source_path: str = flag(
        "--data-source-path",
        "supplies the prompts",
        default=DATA_SOURCE_PATH,
        hook=DATA_SOURCE,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig(Section):
    """Prompts, samples and steps. A rollout has prompts x samples_per_prompt samples."""

    prompts: int = flag("--rollout-batch-size", "prompts per rollout", at_least=1)
    samples_per_prompt: int = flag(
        "--n-samples-per-prompt", "responses per prompt", default=1, at_least=1
    )
    num_rollout: int | None = flag(
        "--num-rollout", "number of rollouts to train", default=None, at_least=1
    )
    num_epoch: int | None = flag(
        "--num-epoch",
        "number of passes over the prompts, in place of --num-rollout",
        default=None,
        at_least=1,
    )
    start_rollout_id: int | None = flag(
        "--start-rollout-id",
        "first rollout (default: the one after the checkpoint's)",
        default=None,
        at_least=0,
    )
    steps_asked: int | None = flag(
        "--num-steps-per-rollout",
        "optimizer steps per rollout (default: 1)",
        default=None,
        at_least=1,
    )
    global_batch_size: int | None = flag(
        "--global-batch-size",
        "samples per optimizer step, in place of --num-steps-per-rollout",
        default=None,
        at_least=1,
    )
    micro_batch_size: int = flag(
        "--micro-batch-size",
        "sequences per micro-batch; ignored with --use-dynamic-batch-size",
        default=1,
        at_least=1,
    )
    dynamic: bool = flag(
        "--use-dynamic-batch-size",
        "pack sequences into micro-batches of up to --max-tokens-per-gpu",
        default=False,
    )
    max_tokens_per_gpu: int | None = flag(
        "--max-tokens-per-gpu",
        "tokens per GPU in one packed micro-batch",
        default=None,
        at_least=1,
    )
    log_probs_max_tokens_per_gpu: int | None = flag(
        "--log-probs-max-tokens-per-gpu",
        "tokens per GPU in one packed micro-batch of a pass without gradients",
        default=None,
        at_least=1,
        inherits="--max-tokens-per-gpu",
    )
    log_probs_chunk_asked: int = flag(
        "--log-probs-chunk-size",
        "where PyTorch computes log-probabilities: number of tokens with float32 logits in memory "
        "at a time; -1: as many as fit in 64 MiB",
        default=-1,
        at_least=-1,
    )
    balance: bool = flag(
        "--balance-data", "give data-parallel ranks equal amounts of work", default=False
    )
    balance_by_flops: bool = flag(
        "--balance-by-flops",
        "like --balance-data, with the cost of attention computed from config.json",
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
        """Number of rollouts of the run, over a data source of `num_prompts` prompts.

        --num-rollout, or the number of whole rollouts in --num-epoch passes. Raises ConfigError
        when that is 0.
        """
        if self.num_rollout is not None:
            return self.num_rollout
        epochs = self.num_epoch or 0
        if epochs * num_prompts < self.prompts:
            raise ConfigError(
                f"--num-epoch {epochs} over {num_prompts} prompts is less than one rollout of "
                f"--rollout-batch-size {self.prompts}. Raise the first or lower the second."
            )
        return epochs * num_prompts // self.prompts

    @property
    def log_probs_chunk(self) -> int | None:
        """Number of tokens with float32 logits in memory at a time; None: as many as fit in 64 MiB."""
        return None if self.log_probs_chunk_asked == -1 else self.log_probs_chunk_asked

    def problems(self) -> Iterator[str]:
        if self.log_probs_chunk_asked == 0:
            yield (
                "--log-probs-chunk-size 0 is too small. Give 1 or more, or -1 for an "
                "automatic choice."
            )
        product = f"{self.samples} samples ({self.prompts} prompts x {self.samples_per_prompt})"
        steps, size = self.steps_asked, self.global_batch_size
        if steps is not None and self.samples % steps:
            yield (
                f"--num-steps-per-rollout {steps} does not divide {product}. Lower it or change "
                "--rollout-batch-size."
            )
        elif steps is not None and size is not None and steps * size != self.samples:
            yield (
                f"--global-batch-size {size} x --num-steps-per-rollout {steps} is not {product}. "
                f"Give --global-batch-size {self.samples // steps}, or only one of the two."
            )
        elif steps is None and size is not None and self.samples % size:
            yield (
                f"--global-batch-size {size} does not divide {product}. Give a divisor, or "
                "give --num-steps-per-rollout instead."
            )
        if self.dynamic and self.max_tokens_per_gpu is None:
            yield (
                "--use-dynamic-batch-size needs the size of a micro-batch. Add "
                "--max-tokens-per-gpu, for example 9216."
            )
        if self.num_rollout is not None and self.num_epoch is not None:
            yield (
                f"--num-rollout {self.num_rollout} and --num-epoch {self.num_epoch} both set the "
                "length of the run. Give one."
            )

"""How responses are sampled and graded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vime.config.fields import Section, flag
from vime.plugins.batch import CONVERT, DATA_POSTPROCESS, LOG, POST_PROCESS
from vime.plugins.rollout import (
    ALL_SAMPLES,
    BUFFER_FILTER,
    DYNAMIC_FILTER,
    GENERATE,
    GROUP_REWARD,
    REWARD,
    ROLLOUT,
    SAMPLE_FILTER,
    SAMPLE_HOOK,
)
from vime.rollout.rm_hub.registry import GRADERS, problems_of

VLLM_ROLLOUT = "vime.rollout.vllm_rollout.generate_rollout"
FULLY_ASYNC = "vime.rollout.fully_async.generate_rollout"
ENGINE_ROLLOUTS = (VLLM_ROLLOUT, FULLY_ASYNC)  # vime's own that sample with engines
SFT_ROLLOUT = "vime.rollout.sft_rollout.generate_rollout"


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig(Section):
    """Sampling. Evaluations use these values, except where an --eval-* flag sets another."""

    function_path: str = flag(
        "--rollout-function-path",
        "generates one rollout",
        default=VLLM_ROLLOUT,
        hook=ROLLOUT,
    )
    temperature: float = flag(
        "--rollout-temperature", "sampling temperature", default=1.0, at_least=0
    )
    top_p: float = flag(
        "--rollout-top-p",
        "sample from the most likely tokens that together have this probability",
        default=1.0,
        above=0,
        at_most=1,
    )
    top_k: int = flag(
        "--rollout-top-k",
        "sample from the N most likely tokens; -1: from all tokens",
        default=-1,
        at_least=-1,
    )
    max_response_len: int = flag(
        "--rollout-max-response-len", "maximum tokens of a response", default=1024, at_least=1
    )
    max_prompt_len: int | None = flag(
        "--rollout-max-prompt-len",
        "maximum tokens of a prompt; longer prompts are dropped and counted",
        default=None,
        at_least=1,
    )
    max_context_len: int | None = flag(
        "--rollout-max-context-len",
        "maximum tokens of prompt and response together",
        default=None,
        at_least=1,
    )
    stop: list | None = flag(
        "--rollout-stop",
        "texts that end a response",
        default=None,
        nargs="+",
        per_dataset=True,
    )
    stop_token_ids: list | None = flag(
        "--rollout-stop-token-ids",
        "tokens that end a response",
        default=None,
        nargs="+",
        type=int,
        per_dataset=True,
    )
    skip_special_tokens: bool = flag(
        "--rollout-skip-special-tokens",
        "leave special tokens out of Sample.response",
        default=False,
    )
    over_sampling: int | None = flag(
        "--over-sampling-batch-size",
        "number of prompts to submit at a time",
        default=None,
        at_least=1,
        inherits="--rollout-batch-size",
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
        "mask tokens that an earlier rollout generated",
        default=False,
        only_with="--partial-rollout",
    )
    max_staleness: int | None = flag(
        "--rollout-max-staleness",
        "restart buffered groups that began more than N rollouts ago (default: never)",
        default=None,
        at_least=0,
        only_with="--partial-rollout",
    )
    max_weight_staleness: int = flag(
        "--max-staleness",
        "train on no token whose weights are more than N versions old; more groups are under way "
        "with a larger N",
        default=2,
        at_least=0,
        only_with=f"--rollout-function-path {FULLY_ASYNC}",
    )
    late_groups: str = flag(
        "--late-groups",
        "groups that would exceed --max-staleness: a step waits for them, or drops or restarts them",
        default="wait",
        choices=("wait", "drop", "restart"),
        only_with=f"--rollout-function-path {FULLY_ASYNC}",
    )
    recompute_kv_cache: bool = flag(
        "--recompute-kv-cache",
        "running requests compute their keys and values again after each weight update",
        default=False,
        only_with=f"--rollout-function-path {FULLY_ASYNC}",
    )
    buffer_filter_path: str = flag(
        "--buffer-filter-path",
        "takes groups out of the buffer of unfinished groups",
        default="vime.rollout.buffer.pop_first",
        hook=BUFFER_FILTER,
    )
    sample_filter_path: str | None = flag(
        "--rollout-sample-filter-path",
        "sets remove_sample on samples that should get no loss",
        default=None,
        hook=SAMPLE_FILTER,
    )
    all_samples_path: str | None = flag(
        "--rollout-all-samples-process-path",
        "sees every sample of a rollout, including the samples of dropped groups",
        default=None,
        hook=ALL_SAMPLES,
    )
    deterministic: bool = flag(
        "--vllm-enable-deterministic-inference",
        "give each sample a seed (--rollout-seed + its index), so equal weights give equal samples",
        default=False,
    )
    custom_generate_path: str | None = flag(
        "--custom-generate-function-path",
        "generates one sample",
        default=None,
        per_dataset=True,
        hook=GENERATE,
    )
    generate_timeout_s: float = flag(
        "--generate-timeout-secs",
        "deadline of one call of --custom-generate-function-path, a filter or a rollout hook",
        default=14400.0,
        above=0,
    )
    sample_hook_paths: list | None = flag(
        "--rollout-sample-hook-path",
        "sees each finished sample and may replace it; takes several paths, and may be repeated",
        default=None,
        nargs="+",
        repeats=True,
        hook=SAMPLE_HOOK,
    )
    log_path: str | None = flag(
        "--custom-rollout-log-function-path",
        "changes the metrics of a rollout before they are logged",
        default=None,
        hook=LOG,
    )
    convert_path: str | None = flag(
        "--custom-convert-samples-to-train-data-path",
        "turns samples into training data",
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
        "YAML file of your own names and values, which your functions read as args.NAME",
        default=None,
    )
    own_values: dict[str, Any] = field(
        default_factory=dict
    )  # from --custom-config-path: {name: value}
    concurrency: int = flag(
        "--vllm-server-concurrency", "requests in flight per engine", default=512, at_least=1
    )

    @property
    def fully_async(self) -> bool:
        """Whether generation never stops."""
        return self.function_path == FULLY_ASYNC

    @property
    def keeps_kv_cache(self) -> bool:
        """Whether engines keep the keys and values of older weights."""
        return self.fully_async and not self.recompute_kv_cache

    def problems(self) -> Iterator[str]:
        if self.fully_async and self.partial:
            yield (
                f"--partial-rollout: --rollout-function-path {FULLY_ASYNC} continues all unfinished "
                "groups anyway. Leave --partial-rollout out."
            )
        if (
            self.max_context_len is not None
            and self.max_prompt_len is not None
            and self.max_prompt_len >= self.max_context_len
        ):
            yield (
                f"--rollout-max-prompt-len {self.max_prompt_len} leaves no room for a response in "
                f"--rollout-max-context-len {self.max_context_len}. Lower the first or raise the "
                "second."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig(Section):
    rm_type: str | None = flag(
        "--rm-type",
        f"the grader: {', '.join(GRADERS)}; with boxed_ in front it grades only the last box",
        default=None,
        per_dataset=True,
    )
    custom_rm_path: str | None = flag(
        "--custom-rm-path",
        "grades a sample",
        default=None,
        per_dataset=True,
        hook=REWARD,
        hook_if={"group_rm": GROUP_REWARD},
    )
    post_process_path: str | None = flag(
        "--custom-reward-post-process-path",
        "computes rewards and scores in place of the estimator's normalisation",
        default=None,
        hook=POST_PROCESS,
    )
    group_rm: bool = flag(
        "--group-rm",
        f"let --custom-rm-path grade a whole group at once: {GROUP_REWARD.shape}",
        default=False,
        only_with="--custom-rm-path",
    )
    rm_url: str | None = flag("--rm-url", "server of --rm-type remote_rm", default=None)
    reward_key: str | None = flag(
        "--reward-key", "the key to train on, if a reward is a dict", default=None
    )
    workers: int = flag("--rm-num-workers", "grader processes", default=1, at_least=1)
    timeout_s: float = flag(
        "--rm-timeout-secs", "deadline for grading one answer", default=10.0, above=0
    )

    def problems(self) -> Iterator[str]:
        yield from problems_of("--rm-type", self.rm_type, self.reward_key, self.rm_url)

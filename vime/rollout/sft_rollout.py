"""The rollout function of --loss-type sft_loss: demonstrations instead of generated samples.

A demonstration is a list of messages that ends with an assistant's message, or a prompt whose label
is the answer. Only the assistant's turns carry loss.
"""

from __future__ import annotations

import logging
from typing import Any

from vime.config import Config
from vime.data import chat
from vime.errors import ConfigError
from vime.types import Group, RolloutFnTrainOutput, Sample, Status

logger = logging.getLogger(__name__)


def generate_rollout(
    args: Any, rollout_id: int, data_source: Any, evaluation: bool = False
) -> RolloutFnTrainOutput:
    """--rollout-batch-size demonstrations, none longer than --rollout-max-context-len.

    Raises ConfigError when a demonstration has no answer, or when every demonstration is too long.
    """
    if evaluation:
        raise ConfigError(
            "--rollout-function-path vime.rollout.sft_rollout.generate_rollout does not evaluate. "
            "Set --eval-function-path vime.rollout.vllm_rollout.generate_rollout, or leave "
            "--eval-interval out."
        )
    cfg: Config = args.config
    tokenizer = chat.load_tokenizer(cfg.model.hf_checkpoint)
    if hasattr(data_source, "rollout_id"):
        data_source.rollout_id = rollout_id
    source = cfg.data.plugin("data_source_path")
    assert source is not None
    groups: list[Group] = []
    skipped: dict[str, float] = {"rollout/skipped_long": 0, "rollout/skipped_refused": 0}
    num_in_a_row = 0
    while len(groups) < cfg.batch.prompts:
        wanted = cfg.batch.prompts - len(groups)
        for group in source.call_method(data_source, "get_samples", wanted):
            reason = _demonstrate(cfg, tokenizer, group, rollout_id)
            if reason is None:
                groups.append(group)
                num_in_a_row = 0
                continue
            skipped[reason] += 1
            num_in_a_row += 1
            if num_in_a_row >= 2 * max(len(data_source), cfg.batch.prompts):
                raise ConfigError(_nothing_fits(cfg, reason))
    return RolloutFnTrainOutput(groups, skipped)


def _demonstrate(cfg: Config, tokenizer: Any, group: Group, rollout_id: int) -> str | None:
    """Makes demonstrations of a group. If it is skipped, returns the metric that counts it."""
    for sample in group:
        try:
            to_demonstration(cfg, tokenizer, sample)
        except chat.TemplateRefusal as error:
            logger.warning(
                "a demonstration is left out: %s It begins: %.200r", error, sample.prompt
            )
            return "rollout/skipped_refused"
        sample.rollout_id = rollout_id
    cap = cfg.rollout.max_context_len
    if cap is not None and any(len(sample.tokens) > cap for sample in group):
        return "rollout/skipped_long"
    return None


def _nothing_fits(cfg: Config, reason: str) -> str:
    if reason == "rollout/skipped_long":
        cap = cfg.rollout.max_context_len
        return f"--rollout-max-context-len {cap} skips every demonstration. Raise it."
    return (
        f"the chat template refuses every demonstration of {cfg.data.prompt_data}; the warnings "
        "above say why. Correct the file, or use a template that takes its messages."
    )


def to_demonstration(cfg: Config, tokenizer: Any, sample: Sample) -> None:
    """Sets tokens, loss mask and text. Without a chat template, prompt and label are plain text."""
    if cfg.data.apply_chat_template or not isinstance(sample.prompt, str):
        tokens, mask = chat.assistant_tokens(
            tokenizer,
            _conversation(sample),
            tools=sample.metadata.get("tools"),
            template_kwargs=cfg.data.apply_chat_template_kwargs,
        )
    else:
        ids, answer = chat.encode(tokenizer, [sample.prompt, _answer(sample)])
        answer = answer + [tokenizer.eos_token_id]
        tokens, mask = ids + answer, [0] * len(ids) + [1] * len(answer)
    first = mask.index(1)
    sample.tokens = tokens
    sample.response_length = len(tokens) - first
    sample.loss_mask = mask[first:]
    sample.response = chat.decode(tokenizer, tokens[first:])
    sample.reward = 0.0
    sample.status = Status.COMPLETED


def _conversation(sample: Sample) -> chat.Messages:
    messages = sample.prompt
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if messages[-1]["role"] == "assistant":
        return messages
    return [*messages, {"role": "assistant", "content": _answer(sample)}]


def _answer(sample: Sample) -> str:
    if not sample.label:
        raise ConfigError(
            f"demonstration {sample.index} has no answer. End its messages with an assistant's "
            "message, or name the field of the answer with --label-key."
        )
    return sample.label

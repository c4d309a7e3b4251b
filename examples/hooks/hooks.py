"""One small example of every hook, in the order in which a rollout calls them.

Each flag takes the dotted path of a function, with the repository on PYTHONPATH:

    --custom-rm-path examples.hooks.hooks.short_is_good

`args` is read-only and holds every flag under its own name; `args.config` is the typed
configuration. A path that cannot be loaded, or a function that cannot be called as below, is
refused before anything starts. docs/data-generation.md has the table.
"""

from __future__ import annotations

import dataclasses
import random

import numpy as np

from vime.data.batching import build_train_batch
from vime.rollout.data_source import RolloutDataSourceWithBuffer
from vime.rollout.generation import generate
from vime.rollout.vllm_rollout import generate_rollout as default_rollout
from vime.types import DynamicFilterOutput, RolloutFnEvalOutput, Sample, TrainBatch


# --data-source-path: a class that hands out groups of --n-samples-per-prompt samples.
class HardestLast(RolloutDataSourceWithBuffer):
    """Puts longer questions later within each batch."""

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        return sorted(super().get_samples(num_samples), key=lambda group: len(group[0].tokens))


# --buffer-filter-path: takes groups out of the buffer, in place.
def newest_first(args, rollout_id, buffer, num_samples):
    buffer.sort(key=lambda group: group[0].metadata.get("start_rollout_id", rollout_id))
    return [buffer.pop() for _ in range(min(num_samples, len(buffer)))]


# --rollout-function-path: makes a whole rollout; returns RolloutFnTrainOutput or a list of groups.
def warm_up_rollout(args, rollout_id, data_source, evaluation=False):
    output = default_rollout(args, rollout_id, data_source, evaluation)
    output.metrics["rollout/is_warm_up"] = float(rollout_id < 10)
    return output


# --custom-generate-function-path: generates one sample, with any number of calls of `generate`.
async def try_twice(args, sample, sampling_params, evaluation=False):
    sample = await generate(args, sample, sampling_params)
    if not evaluation and sample.response_length < 4:  # continues from the tokens so far
        sample = await generate(args, sample, sampling_params | {"temperature": 1.2})
    return sample


# --custom-rm-path: returns the reward of one sample; a plain function runs in a thread.
async def short_is_good(args, sample, **kwargs):
    return float(sample.response_length <= args.rollout_max_response_len // 2)


# --custom-rm-path with --group-rm: returns the rewards of a whole group.
async def shortest_wins(args, samples, **kwargs):
    shortest = min(sample.response_length for sample in samples)
    return [float(sample.response_length == shortest) for sample in samples]


# --rollout-sample-hook-path: receives each finished sample; may change or replace it.
async def note_length(args, sample):
    sample.metadata["length"] = sample.response_length


# --dynamic-sampling-filter-path: keeps or drops a group; drops are counted by reason.
def not_all_truncated(args, samples, **kwargs):
    truncated = all(sample.status is Sample.Status.TRUNCATED for sample in samples)
    return DynamicFilterOutput(not truncated, "truncated")


# --rollout-sample-filter-path: a sample with `remove_sample` has no loss, but counts in statistics.
def drop_truncated(args, groups):
    for group in groups:
        for sample in group:
            sample.remove_sample = sample.status is Sample.Status.TRUNCATED


# --rollout-all-samples-process-path: receives every sample taken, also the dropped ones.
def count_by_status(args, all_samples, data_source):
    names = [sample.status.value for sample in all_samples]
    print({name: names.count(name) for name in sorted(set(names))})


# --custom-reward-post-process-path: returns (raw rewards, scores) instead of group normalisation.
def centred_on_the_batch(args, samples):
    raw = [sample.get_reward_value(args) for sample in samples]
    mean = sum(raw) / len(raw)
    return raw, [reward - mean for reward in raw]


# --custom-convert-samples-to-train-data-path: returns a TrainBatch or a dict of columns.
def as_columns(args, samples):
    return {
        "tokens": [sample.tokens for sample in samples],
        "response_lengths": [sample.response_length for sample in samples],
        "rewards": [2 * sample.get_reward_value(args) - 1 for sample in samples],
        "rollout_log_probs": [sample.rollout_log_probs for sample in samples],
    }


# The same hook returning a TrainBatch, here with half of the groups.
def every_other_group(args, samples) -> TrainBatch:
    groups = {sample.group_index: [] for sample in samples}
    for sample in samples:
        groups[sample.group_index].append(sample)
    return build_train_batch(list(groups.values())[::2], args.config, samples[0].rollout_id)


# --rollout-data-postprocess-path: may replace the trainer's batch; None keeps it.
def clip_scores(args, rollout_id, batch):
    clipped = [
        dataclasses.replace(s, reward=float(np.clip(s.reward, -1, 1))) for s in batch.sequences
    ]
    return dataclasses.replace(batch, sequences=tuple(clipped))


# --custom-rollout-log-function-path: changes `metrics` in place; True skips the default logging.
def log_share_of_short(rollout_id, args, samples, metrics, rollout_time):
    metrics["rollout/share_of_short"] = np.mean([s.response_length < 8 for s in samples])


# --eval-function-path: like the rollout function, with evaluation=True.
def no_evaluation_yet(args, rollout_id, data_source, evaluation=True):
    if rollout_id >= 100:
        return default_rollout(args, rollout_id, data_source, evaluation)
    return RolloutFnEvalOutput({}, {"eval/skipped": 1.0})


# --custom-eval-rollout-log-function-path: {dataset: {"rewards", "truncated", "samples"}}.
def show_an_answer(rollout_id, args, data, metrics):
    for name, part in data.items():
        print(name, random.choice(part["samples"]).response[-200:])

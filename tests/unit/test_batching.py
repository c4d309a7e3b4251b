"""The batch gives each token its final weight, whatever happened to other samples."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vime.config import (
    AlgorithmConfig,
    BatchConfig,
    CheckpointConfig,
    ClusterConfig,
    Config,
    DataConfig,
    DebugConfig,
    EngineConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardConfig,
    RolloutConfig,
)
from vime.data.batching import build_train_batch
from vime.data.columns import as_train_batch
from vime.data.packing import ATTENTION_EQUALS_REST, PackingRules
from vime.data.train_batch import parts_of, token_weights
from vime.errors import PluginError
from vime.types import Sample, Status


def make_config(prompts=2, n=2, *, gpus=1, algorithm=None, parallel=None, reward=None, **batch):
    batch = {"dynamic": True, "max_tokens_per_gpu": 64, **batch}
    return Config(
        cluster=ClusterConfig(actor_gpus_per_node=gpus),
        model=ModelConfig(hf_checkpoint="unused"),
        parallel=ParallelConfig(**(parallel or {})),
        optimizer=OptimizerConfig(),
        data=DataConfig(),
        batch=BatchConfig(prompts=prompts, samples_per_prompt=n, **batch),
        rollout=RolloutConfig(),
        reward=RewardConfig(**(reward or {})),
        eval=EvalConfig(),
        checkpoint=CheckpointConfig(),
        algorithm=AlgorithmConfig(**(algorithm or {})),
        engine=EngineConfig(),
        log=LogConfig(),
        debug=DebugConfig(),
    )


def sample(index, group, response=3, reward=0.0, prompt=2, **kw):
    kw = {"status": Status.COMPLETED, "rollout_log_probs": [-1.0] * response, **kw}
    return Sample(
        index=index,
        group_index=group,
        tokens=list(range(prompt + response)),
        response_length=response,
        reward=reward,
        **kw,
    )


def two_groups(**changes):
    """Rewards 1 0 | 1 1, responses of 2, 4, 3, 1 tokens; `changes` is {s + index: fields}."""
    samples = [
        sample(0, 0, response=2, reward=1.0),
        sample(1, 0, response=4, reward=0.0),
        sample(2, 1, response=3, reward=1.0),
        sample(3, 1, response=1, reward=1.0),
    ]
    for name, fields in changes.items():
        i = int(name.removeprefix("s"))
        samples[i] = dataclasses.replace(samples[i], **fields)
    return [samples[:2], samples[2:]]


def test_weights_give_the_mean_over_samples_of_token_means():
    batch = build_train_batch(two_groups(), make_config(), 5)
    assert batch.rollout_id == 5
    for seq, r in zip(batch.sequences, (2, 4, 3, 1), strict=True):
        np.testing.assert_allclose(seq.weight, np.full(r, 1 / (r * 4)), rtol=1e-6)


def test_per_token_weights_give_the_mean_over_tokens():
    cfg = make_config(algorithm={"per_token_loss": True})
    batch = build_train_batch(two_groups(s1={"loss_mask": [1, 0, 0, 1]}), cfg, 0)
    np.testing.assert_allclose(batch.sequences[1].weight, np.array([1, 0, 0, 1]) / 8, rtol=1e-6)


def test_each_step_has_its_own_weights():
    batch = build_train_batch(two_groups(), make_config(steps_asked=2), 0)
    assert len(batch.steps) == 2
    np.testing.assert_allclose(batch.sequences[3].weight, [1 / 2])
    np.testing.assert_allclose(batch.sequences[0].weight, [1 / 4, 1 / 4])


def test_scores_are_relative_to_the_group():
    batch = build_train_batch(two_groups(), make_config(), 0)
    assert [s.reward for s in batch.sequences] == pytest.approx(
        [0.707106, -0.707106, 0.0, 0.0], abs=1e-5
    )
    assert [s.raw_reward for s in batch.sequences] == [1.0, 0.0, 1.0, 1.0]
    m = batch.metrics
    assert m["rollout/raw_reward"] == 0.75
    assert m["rollout/zero_std/count"] == m["rollout/zero_std/count_1"] == 1
    assert m["rollout/response_len/max"] == 4
    assert m["rollout/response_len/mean"] == 2.5
    assert m["rollout/total_tokens"] == 18
    assert m["perf/packing_efficiency"] == 18 / 64


def test_a_removed_sample_counts_in_its_group_and_step_but_has_no_weight():
    batch = build_train_batch(two_groups(s1={"remove_sample": True}), make_config(), 0)
    assert batch.sequences[1].weight.sum() == 0
    assert batch.sequences[0].reward == pytest.approx(0.707106, abs=1e-5)
    assert batch.sequences[0].weight.sum() == pytest.approx(1 / 4)
    assert batch.metrics["rollout/removed_samples"] == 1


@pytest.mark.parametrize(
    "fields", [{"status": Status.FAILED, "failure": "grader died"}, {"reward": None}]
)
def test_a_failed_sample_is_counted_but_has_no_part_in_loss_and_statistics(fields):
    batch = build_train_batch(two_groups(s1=fields), make_config(), 0)
    assert [s.index for s in batch.sequences] == [0, 2, 3]
    assert batch.sequences[0].reward == 0.0  # now alone in its group
    assert batch.metrics["rollout/failed_samples"] == 1
    assert batch.metrics["rollout/raw_reward"] == 1.0
    assert sum(s.weight.sum() for s in batch.sequences) == pytest.approx(1.0)


def test_all_samples_failed_is_an_error_with_the_reason():
    groups = [[sample(0, 0, reward=None, failure="grader died")]]
    with pytest.raises(ValueError, match=r"none of its 1 samples.*grader died"):
        build_train_batch(groups, make_config(1, 1), 3)


def test_an_empty_response_counts_in_the_statistics_but_has_no_sequence():
    empty = {"tokens": [1, 2], "response_length": 0, "rollout_log_probs": []}
    batch = build_train_batch(two_groups(s1=empty), make_config(), 0)
    assert [s.index for s in batch.sequences] == [0, 2, 3]
    assert batch.sequences[0].reward > 0
    assert batch.metrics["rollout/empty_samples"] == 1


def test_an_unfinished_sample_is_refused():
    with pytest.raises(ValueError, match="sample 2 is aborted"):
        build_train_batch(two_groups(s2={"status": Status.ABORTED}), make_config(), 0)


@pytest.mark.parametrize("name", ["loss_mask", "rollout_log_probs"])
def test_a_list_that_does_not_match_the_response_is_refused(name):
    with pytest.raises(ValueError, match=f"sample 2: {name} has 1 entries .* 3 tokens"):
        build_train_batch(two_groups(s2={name: [1]}), make_config(), 0)


def test_the_reward_key_picks_from_a_dict_and_a_missing_key_is_named():
    groups = [[sample(0, 0, reward={"acc": 1.0}), sample(1, 0, reward={"acc": 0.0})]]
    cfg = make_config(1, 2, reward={"reward_key": "acc"})
    assert build_train_batch(groups, cfg, 0).metrics["rollout/raw_reward"] == 0.5
    with pytest.raises(PluginError, match="--reward-key score"):
        build_train_batch(groups, make_config(1, 2, reward={"reward_key": "score"}), 0)


def test_sft_needs_neither_rewards_nor_rollout_log_probabilities():
    groups = [[sample(0, 0, reward=None, rollout_log_probs=None)]]
    batch = build_train_batch(groups, make_config(1, 1, algorithm={"loss_type": "sft_loss"}), 0)
    assert batch.sequences[0].rollout_logp is None
    assert "rollout/raw_reward" not in batch.metrics


def test_missing_rollout_log_probabilities_stay_missing():
    batch = build_train_batch(two_groups(s2={"rollout_log_probs": None}), make_config(), 0)
    assert batch.sequences[2].rollout_logp is None
    assert batch.sequences[1].rollout_logp is not None


def test_a_step_whose_samples_all_failed_is_left_out():
    gone = {"reward": None}
    batch = build_train_batch(two_groups(s0=gone, s1=gone), make_config(steps_asked=2), 0)
    assert len(batch.steps) == 1
    assert sum(s.weight.sum() for s in batch.sequences) == pytest.approx(1.0)


def test_each_data_parallel_rank_gets_only_its_own_sequences():
    batch = build_train_batch(two_groups(), make_config(gpus=2, steps_asked=2), 3)
    parts = parts_of(batch, 2)
    for rank, part in enumerate(parts):
        mine = {p for step in batch.steps for b in step.micro_batches[rank] for p in b}
        assert set(part.sequences) == mine
        assert all(part.sequences[p] is batch.sequences[p] for p in mine)
        assert part.lengths.tolist() == [4, 6, 5, 3]
        assert part.indices.tolist() == [0, 1, 2, 3]
        assert (part.rollout_id, part.steps, part.forward) == (3, batch.steps, batch.forward)
    assert sorted(p for part in parts for p in part.sequences) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="planned for 2 data-parallel ranks; there are 4"):
        parts_of(batch, 4)


def test_forward_only_passes_have_their_own_packing_on_request():
    assert build_train_batch(two_groups(), make_config(), 0).forward is None
    cfg = make_config(max_tokens_per_gpu=6, log_probs_max_tokens_per_gpu=100)
    batch = build_train_batch(two_groups(), cfg, 0)
    assert batch.steps[0].num_micro_batches == 4
    assert batch.forward.num_micro_batches == 1


@given(
    st.lists(st.integers(1, 30), min_size=4, max_size=24),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_weights_do_not_care_how_tokens_are_split(lengths, dp, steps, dynamic, balance, per_token):
    groups = [[sample(i, i // 4, response=r, reward=float(i % 3))] for i, r in enumerate(lengths)]
    algorithm = {"per_token_loss": per_token}
    one = build_train_batch(groups, make_config(6, 1, steps_asked=steps, algorithm=algorithm), 0)
    many = build_train_batch(
        groups,
        make_config(
            6,
            1,
            gpus=dp,
            steps_asked=steps,
            dynamic=dynamic,
            max_tokens_per_gpu=40,
            micro_batch_size=2,
            balance=balance,
            algorithm=algorithm,
        ),
        0,
    )
    placed = sorted(p for plan in many.steps for r in plan.micro_batches for b in r for p in b)
    assert placed == list(range(len(many.sequences)))
    for a, b in zip(one.steps, many.steps, strict=True):
        members = {p for r in a.micro_batches for m in r for p in m}
        assert members == {p for r in b.micro_batches for m in r for p in m}
        assert sum(many.sequences[p].weight.sum() for p in members) == pytest.approx(1, abs=1e-5)
    for a, b in zip(one.sequences, many.sequences, strict=True):
        np.testing.assert_array_equal(a.weight, b.weight)


def test_a_sequence_without_loss_tokens_has_no_weight_in_both_modes():
    masks = [np.zeros(3, np.float32), np.ones(2, np.float32)]
    assert [w.sum() for w in token_weights(masks, per_token=False)] == [0.0, 0.5]
    assert [w.sum() for w in token_weights(masks, per_token=True)] == [0.0, 1.0]


def test_dr_grpo_divides_by_a_constant_and_not_by_a_std():
    cfg = make_config(algorithm={"advantage_estimator": "dr_grpo"})  # responses of up to 1024
    batch = build_train_batch(two_groups(), cfg, 0)
    assert [s.reward for s in batch.sequences] == [0.5, -0.5, 0.0, 0.0]
    for seq in batch.sequences:
        np.testing.assert_allclose(seq.weight, 1 / (1024 * 4), rtol=1e-6)


def test_a_response_in_the_overlong_buffer_loses_reward_before_the_baseline():
    cfg = make_config(
        algorithm={"overlong_buffer_len": 1022, "overlong_penalty": 511.0, "grpo_std": False}
    )
    batch = build_train_batch(two_groups(), cfg, 0)  # 2 tokens are free, each more costs 0.5
    # rewards 1 and 0 - 1, then 1 - 0.5 and 1
    assert [s.reward for s in batch.sequences] == pytest.approx([1.0, -1.0, -0.25, 0.25])
    assert [s.raw_reward for s in batch.sequences] == [1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("flag", ["use_rollout_logprobs", "use_tis", "mismatch_metrics"])
def test_a_missing_log_probability_that_a_flag_needs_is_refused_with_its_sample(flag):
    cfg = make_config(algorithm={flag: True})
    assert build_train_batch(two_groups(), cfg, 0)
    masked = {"rollout_log_probs": [-1.0, float("nan"), -1.0], "loss_mask": [1, 0, 1]}
    assert build_train_batch(two_groups(s2=masked), cfg, 0)
    for missing in (None, [-1.0, float("nan"), -1.0]):
        with pytest.raises(ValueError, match="sample 2 has no rollout_log_probs.*--"):
            build_train_batch(two_groups(s2={"rollout_log_probs": missing}), cfg, 0)


def test_a_users_weights_replace_the_mean_and_respect_the_mask():
    groups = two_groups(s1={"loss_mask": [1, 0, 0, 1]})
    batch = build_train_batch(
        groups, make_config(), 0, weigh=lambda masks, per_token: [0.5 + 0 * m for m in masks]
    )
    assert batch.sequences[1].weight.tolist() == [0.5, 0, 0, 0.5]
    assert batch.sequences[0].weight.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_not_finite_is_refused_with_the_samples_index(reward):
    groups = two_groups(s2={"reward": reward, "index": 77})
    with pytest.raises(PluginError, match="sample 77 has the reward .*finite"):
        build_train_batch(groups, make_config(), 0)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("scores", "problem"),
    [
        ([1.0, NAN, 0.0, 0.0], "sample 1 has the score nan"),
        ([1.0, 0.0, INF, 0.0], "sample 2 has the score inf"),
        ([1.0, 0.0, 0.0, 1e39], r"sample 3 has the score 1e\+39.*in float32"),
    ],
)
def test_a_score_that_no_float32_holds_is_refused_with_its_sample(scores, problem):
    with pytest.raises(ValueError, match=problem):
        build_train_batch(
            two_groups(), make_config(), 0, post_process=lambda samples: ([0.0] * 4, scores)
        )


def test_rewards_whose_mean_overflows_are_refused_where_the_score_is_not_finite():
    groups = two_groups(s0={"reward": 3e38}, s1={"reward": 2e38})
    with pytest.raises(ValueError, match="sample 0 has the score"):
        build_train_batch(groups, make_config(), 0)


@pytest.mark.parametrize("entry", [NAN, INF, -1.0])
def test_a_loss_mask_that_cannot_weigh_is_refused_with_its_sample(entry):
    with pytest.raises(ValueError, match=f"sample 1 has a loss_mask with {entry}"):
        build_train_batch(two_groups(s1={"loss_mask": [1, 1, entry, 1]}), make_config(), 0)


@pytest.mark.parametrize("change", [{"reward": NAN}, {"raw_reward": -INF}])
def test_a_users_batch_with_a_number_that_is_not_finite_is_refused(change):
    made = build_train_batch(two_groups(), make_config(), 0)
    first, *rest = made.sequences
    spoilt = dataclasses.replace(made, sequences=(dataclasses.replace(first, **change), *rest))
    with pytest.raises(ValueError, match="sample 0 has the"):
        as_train_batch(spoilt, make_config(), 0)
    assert as_train_batch(made, make_config(), 0) is made


def test_supervised_batches_have_no_scores():
    cfg = make_config(algorithm={"loss_type": "sft_loss"})
    made = build_train_batch(two_groups(), cfg, 0)
    assert np.isnan([s.reward for s in made.sequences]).all()
    assert as_train_batch(made, cfg, 0) is made


def test_a_group_of_one_has_a_sequence_but_no_advantage():
    batch = build_train_batch([[sample(0, 0, reward=5.0)]], make_config(1, 1), 0)
    (seq,) = batch.sequences
    assert seq.reward == 0.0
    assert seq.weight.sum() == pytest.approx(1.0)


def test_a_fully_masked_sample_counts_in_the_step_but_has_no_weight():
    batch = build_train_batch(two_groups(s0={"loss_mask": [0, 0]}), make_config(), 0)
    assert batch.sequences[0].weight.tolist() == [0.0, 0.0]
    assert batch.sequences[1].reward == pytest.approx(-0.707106, abs=1e-5)
    np.testing.assert_allclose(batch.sequences[1].weight, 1 / 16)


def test_balancing_by_flops_depends_on_the_model(tmp_path):
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"intermediate_size": 16, "vocab_size": 100, "model_type": "llama"}
    shape |= {"rms_norm_eps": 1e-6, "max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    cfg = make_config(balance_by_flops=True)
    cfg = dataclasses.replace(cfg, model=ModelConfig(hf_checkpoint=str(tmp_path)))
    rules = PackingRules.of(cfg)
    assert rules.balance
    # 4 x 8 x 8 of attention, 3 x 8 x 16 of the MLP, 2 x 8 of norms, half of 8 + 8 x 100 of the
    # last norm and the output matrix; 8 attention columns
    assert rules.attention_equals_rest == (256 + 384 + 16 + 4 + 400) / 8
    assert PackingRules.of(make_config()).attention_equals_rest == ATTENTION_EQUALS_REST


def test_a_batch_names_the_newest_weights_that_generated_a_token_with_loss():
    groups = [[sample(0, 0, weight_versions=[3, 3, 4]), sample(1, 0, weight_versions=[-1] * 3)]]
    assert build_train_batch(groups, make_config(1), 0).weight_version == 4
    groups[0][0].loss_mask = [1, 1, 0]
    assert build_train_batch(groups, make_config(1), 0).weight_version == 3
    groups[0][0].weight_versions = []
    assert build_train_batch(groups, make_config(1), 0).weight_version is None

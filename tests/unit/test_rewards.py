"""Group statistics are keyed by group id."""

from types import SimpleNamespace

import pytest

from vime.config.sections.algorithm import AlgorithmConfig
from vime.data.rewards import overlong_penalty, score_samples, zero_std_counts
from vime.rollout.filter_hub.dynamic_sampling_filters import check_reward_nonzero_std
from vime.types import Sample


def test_groups_may_be_interleaved_and_of_unequal_size():
    scores = score_samples([1, 5, 0, 5, 5], ["a", "b", "a", "b", "b"], AlgorithmConfig())
    # a: +-0.5 over 0.70711; b: all equal
    assert scores == pytest.approx([0.707106, 0.0, -0.707106, 0.0, 0.0], abs=1e-5)
    assert scores[1] == scores[3] == scores[4] == 0.0


def test_without_std_normalisation_the_score_is_only_centred():
    scores = score_samples([4, 0], [7, 7], AlgorithmConfig(grpo_std=False))
    assert scores == [2.0, -2.0]


def test_without_reward_normalisation_the_score_is_the_reward():
    cfg = AlgorithmConfig(normalize_rewards=False)
    assert score_samples([4, 0.1], [7, 7], cfg) == [4.0, 0.1]


def test_a_reward_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="nan of sample 1"):
        score_samples([1.0, float("nan")], [0, 0], AlgorithmConfig())


def test_maxrl_refuses_a_reward_below_0():
    cfg = AlgorithmConfig(advantage_estimator="maxrl")
    with pytest.raises(ValueError, match=r"reward -0\.5 is below 0.*Give rewards from 0 up"):
        score_samples([1.0, -0.5], [0, 0], cfg)


def test_zero_std_groups_are_counted_by_their_reward():
    counts = zero_std_counts([1, 1, 0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 2, 2, 3, 4])
    assert counts == {1: 1, 0: 1}  # groups 3 and 4 have one member each


def test_the_overlong_punishment_grows_linearly_over_the_buffer():
    lengths = (80, 90, 100, 120)
    assert [overlong_penalty(n, 100, 20, 2.0) for n in lengths] == [0.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("size", [2, 8, 16])
def test_a_group_of_equal_rewards_is_dropped_counted_and_scored_0_for_any_reward(size):
    args = SimpleNamespace(reward_key=None)
    cfg = AlgorithmConfig()
    for reward in [i / 100 for i in range(-150, 151)]:
        samples = [Sample(reward=reward) for _ in range(size)]
        assert not check_reward_nonzero_std(args, samples), reward
        assert zero_std_counts([reward] * size, [0] * size) == {reward: 1}
        assert score_samples([reward] * size, [0] * size, cfg) == [0.0] * size
        samples[0].reward += 1e-9
        assert check_reward_nonzero_std(args, samples), reward

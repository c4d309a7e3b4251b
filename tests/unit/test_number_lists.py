"""Fields that hold arrays until somebody reads their lists."""

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest

from vime.number_lists import Numbers, Runs, array_of, extend, listed, stored
from vime.types import Sample

TOKENS = [5, 151_000, 7]
LOG_PROBS = [-0.5, -0.25]


def generated() -> Sample:
    """A prompt of one token and a response of two, as the engine's answer leaves them."""
    sample = Sample(index=3, tokens=TOKENS[:1], response_length=2)
    extend(sample, "tokens", Numbers(np.array(TOKENS[1:], np.int32)))
    extend(sample, "rollout_log_probs", Numbers(np.array(LOG_PROBS, np.float32)))
    extend(sample, "weight_versions", Runs((4,), (1,)))
    extend(sample, "weight_versions", Runs((5,), (1,)))
    return sample


def plain() -> Sample:
    return Sample(
        index=3,
        tokens=list(TOKENS),
        response_length=2,
        rollout_log_probs=list(LOG_PROBS),
        weight_versions=[4, 5],
    )


def is_array(sample: Sample) -> bool:
    return isinstance(stored(sample, "tokens"), Numbers)


def test_a_reader_gets_an_ordinary_list_and_may_change_it():
    sample = generated()
    assert is_array(sample)
    assert type(sample.tokens) is list
    assert sample.tokens == TOKENS
    assert all(type(token) is int for token in sample.tokens)
    assert all(type(value) is float for value in sample.rollout_log_probs)
    assert sample.weight_versions == [4, 5]
    sample.tokens += [8]
    sample.tokens.append(9)
    sample.rollout_log_probs[0] = -3
    del sample.weight_versions[0]
    assert sample.tokens[1:] == [151_000, 7, 8, 9]
    assert json.loads(json.dumps(sample.tokens)) == [*TOKENS, 8, 9]
    assert sample.rollout_log_probs == [-3, -0.25]
    assert sample.weight_versions == [5]


def test_lengths_and_copies_leave_the_arrays():
    sample = generated()
    assert sample.prompt_length == 1
    assert array_of(sample, "tokens").tolist() == TOKENS
    assert listed(sample, "weight_versions") == [4, 5]
    assert sample.to_dict() == plain().to_dict()
    assert is_array(sample)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        copy.copy,
        lambda s: pickle.loads(pickle.dumps(s)),
        lambda s: Sample.from_dict(s.to_dict()),
        dataclasses.replace,
    ],
)
def test_copies_are_equal_to_a_sample_with_lists(copied):
    assert copied(generated()) == plain()
    assert copied(plain()) == generated()
    assert repr(copied(generated())) == repr(plain())


def test_a_list_of_a_user_stays_as_it_is():
    sample = Sample(tokens=[1, 2], rollout_log_probs=[0.1])
    given = sample.rollout_log_probs
    assert sample.rollout_log_probs is given
    extend(sample, "rollout_log_probs", Numbers(np.array([-0.5], np.float32)))
    assert sample.rollout_log_probs == [0.1, -0.5]  # 0.1 is no float32
    assert given == [0.1]
    extend(sample, "tokens", [2**40])
    extend(sample, "tokens", Numbers(np.array([3], np.int32)))
    assert sample.tokens == [1, 2, 2**40, 3]
    sample.tokens = (1, 2)
    assert sample.tokens == (1, 2)


def test_runs_and_lists_of_versions_add_up():
    sample = Sample(weight_versions=[1, 1])
    extend(sample, "weight_versions", Runs((2, 3), (2, 1)))
    assert sample.weight_versions == [1, 1, 2, 2, 3]
    assert len(Runs((2, 3), (2, 1))) == 3
    assert Runs((2, 3), (2, 1)).array().tolist() == [2, 2, 3]

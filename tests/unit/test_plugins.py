import pytest

from tests.unit.fake_engine import make_config
from vime.errors import PluginError
from vime.rollout import plugins
from vime.rollout.filter_hub.dynamic_sampling_filters import as_verdict, check_reward_nonzero_std
from vime.rollout.plugins import check_hooks, load_function
from vime.types import DynamicFilterOutput, Sample

HERE = __name__


def too_short(args):
    return 1


async def fits(args, sample, **kwargs):
    return 1.0


not_a_function = 3


def test_a_function_is_loaded_once_and_checked():
    assert load_function(f"{HERE}.fits", plugins.REWARD) is load_function(f"{HERE}.fits")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("fits", "not a dotted path"),
        ("no.such.module.f", "importing no.such.module failed"),
        (f"{HERE}.fit", "has no 'fit'; it has: .*fits"),
        ("vime.rollout.plain.x", r"has no 'x'; it has: \w+\.$"),  # not what it imports
        (f"{HERE}.not_a_function", "is a int"),
        (f"{HERE}.too_short", r"too_short\(args\).*Expected: async f\(args, sample, \*\*kwargs\)"),
    ],
)
def test_a_bad_path_says_what_is_wrong_and_what_is_expected(path, words):
    with pytest.raises(PluginError, match=words):
        load_function(path, plugins.REWARD)


def test_every_bad_hook_is_reported_with_its_flag():
    cfg = make_config(
        "none",
        reward={"custom_rm_path": f"{HERE}.too_short"},
        rollout={"dynamic_filter_path": "a.b", "custom_generate_path": f"{HERE}.fits"},
    )
    problems = check_hooks(cfg)
    flags = [problem.split()[0] for problem in problems]
    assert flags == [
        "--custom-generate-function-path",
        "--dynamic-sampling-filter-path",
        "--custom-rm-path",
    ]


def test_the_defaults_of_every_hook_fit():
    assert check_hooks(make_config("none")) == []


def group(*rewards):
    return [Sample(reward=reward) for reward in rewards]


def test_the_documents_filter_keeps_groups_that_differ():
    assert bool(check_reward_nonzero_std(None, group(0.0, 1.0)))
    assert not bool(check_reward_nonzero_std(None, group(1.0, 1.0)))


def test_a_verdict_is_a_bool_a_tensor_or_a_reason():
    answer = check_reward_nonzero_std(None, group(1.0, 1.0))
    assert as_verdict(answer, group(1.0, 1.0), None) == DynamicFilterOutput(False, "zero_std_1")
    assert as_verdict(True, group(1.0), None) == DynamicFilterOutput(True)
    assert as_verdict(False, group(0.0, 1.0), None) == DynamicFilterOutput(False, "filtered")
    said = DynamicFilterOutput(False, "too easy")
    assert as_verdict(said, group(1.0), None) == said

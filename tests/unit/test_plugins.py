"""Users' functions: how vime loads them, calls them and judges what they return."""

import asyncio
import copy
import dataclasses
import re

import numpy as np
import pytest
import torch

from tests.unit.fake_engine import make_config
from vime.config.plugins import check_plugins, plugins_named_in
from vime.data.batching import build_train_batch
from vime.errors import PluginError, ReturnError
from vime.plugins import batch, rollout, trainer
from vime.plugins.hook import Hook, Plugin
from vime.rollout.filter_hub.dynamic_sampling_filters import as_verdict, check_reward_nonzero_std
from vime.types import (
    DynamicFilterOutput,
    RolloutFnEvalOutput,
    RolloutFnTrainOutput,
    Sample,
    Status,
)

HERE = __name__
HOOKS = {
    name: hook
    for module in (rollout, batch, trainer)
    for name, hook in vars(module).items()
    if isinstance(hook, Hook)
}

# -- loading ---------------------------------------------------------------------------------------


def too_short(args):
    return 1


async def fits(args, sample, **kwargs):
    return 1.0


not_a_function = 3


def at(path, hook=rollout.REWARD):
    return Plugin("--some-flag", path, hook)


def test_a_function_is_loaded_once(tmp_path, monkeypatch):
    (tmp_path / "counted_hook.py").write_text("def f(args, sample): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    first = at("counted_hook.f").function
    assert at("counted_hook.f").function is first
    assert at("counted_hook.f", rollout.SAMPLE_HOOK).function is first


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("fits", "not a dotted path"),
        ("no.such.module.f", "importing no.such.module failed"),
        (f"{HERE}.fit", "has no 'fit'; it has: .*fits"),
        ("vime.rollout.plain.x", r"has no 'x'; it has: \w+\.$"),  # not what it imports
        (f"{HERE}.not_a_function", "is 3, not a function or class"),
        (f"{HERE}.too_short", r"too_short\(args\).*Expected: async f\(args, sample, \*\*kwargs\)"),
    ],
)
def test_a_bad_path_says_what_is_wrong_and_what_is_expected(path, words):
    problem = at(path).problem()
    assert problem.startswith(f"--some-flag {path}" if "." in path else "--some-flag")
    assert re.search(words, problem)
    with pytest.raises(PluginError, match=words):
        at(path)()


def test_every_bad_hook_is_reported_with_its_flag():
    cfg = make_config(
        "none",
        reward={"custom_rm_path": f"{HERE}.too_short"},
        rollout={"dynamic_filter_path": "a.b", "custom_generate_path": f"{HERE}.fits"},
    )
    assert [problem.split()[0] for problem in check_plugins(cfg)] == [
        "--dynamic-sampling-filter-path",
        "--custom-generate-function-path",
        "--custom-rm-path",
    ]


def test_the_defaults_of_every_hook_fit():
    """They are not checked at a start, which would import torch for nothing."""
    cfg = make_config("none")
    assert list(plugins_named_in(cfg)) == []
    defaults = {"data": "data_source_path", "rollout": "function_path"}
    for section, field in [*defaults.items(), ("rollout", "buffer_filter_path")]:
        assert getattr(cfg, section).plugin(field).problem() is None


# -- asynchronous functions ------------------------------------------------------------------------


async def asynchronous(*args, **kwargs):
    return await asyncio.sleep(0, args)


class AsynchronousObject:
    async def __call__(self, *args, **kwargs):
        return args


asynchronous_object = AsynchronousObject()


class AsynchronousSource:
    def __init__(self, args):
        pass

    async def get_samples(self, num_samples):
        return []

    add_samples = save = load = __len__ = lambda self, *args: 0


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("function", ["asynchronous", "asynchronous_object"])
def test_an_asynchronous_function_is_refused_before_the_start_where_vime_cannot_await_it(
    name, function
):
    problem = at(f"{HERE}.{function}", HOOKS[name]).problem()
    if HOOKS[name].may_await:
        assert problem is None
    else:
        assert "is asynchronous, and vime cannot await it there. Write a plain `def`." in problem


def test_an_asynchronous_method_of_a_data_source_is_refused_before_the_start():
    problem = at(f"{HERE}.AsynchronousSource", rollout.DATA_SOURCE).problem()
    assert "AsynchronousSource.get_samples is asynchronous" in problem


def test_every_hook_that_may_be_asynchronous_says_so_in_its_shape():
    for hook in HOOKS.values():
        assert hook.shape.startswith("async ") == hook.may_await, hook.shape


# -- what functions return -------------------------------------------------------------------------


def answer(*args, **kwargs):
    """The function of every test below: it returns what `ANSWER` makes of its arguments."""
    return ANSWER(*args, **kwargs)


def called(hook, make, *args, **kwargs):
    global ANSWER
    ANSWER = make
    plugin = Plugin("--the-flag", f"{HERE}.answer", hook)
    if hook.may_await:
        return asyncio.run(plugin.call(*args, **kwargs))
    return plugin(*args, **kwargs)


def sample(index=0, group=0, size=2, **fields):
    logp = [-1.0] * size
    given = {"reward": 1.0, "rollout_log_probs": logp, "status": Status.COMPLETED} | fields
    return Sample(
        index=index, group_index=group, tokens=[5, 6, *range(size)], response_length=size, **given
    )


def pair():
    return [[sample(0), sample(1)], [sample(2, 1), sample(3, 1)]]


def train_batch():
    return build_train_batch(pair(), make_config("none", batch={"samples_per_prompt": 2}), 0)


def first_sequence(**changes):
    made = train_batch()
    first = dataclasses.replace(made.sequences[0], **changes)
    return dataclasses.replace(made, sequences=(first, *made.sequences[1:]))


def columns(**changes):
    good = {"tokens": [[1, 2, 3]], "response_lengths": [2], "rewards": [0.5]}
    return {n: v for n, v in {**good, **changes}.items() if v != "left out"}


LOGP = torch.tensor([-1.0, -2.0], requires_grad=True)
LOSS_KNOWN = dict.fromkeys(trainer.LOSS.keywords)
TIS_KNOWN = dict.fromkeys(trainer.TIS.keywords) | {"pg_loss": LOGP}
MASKS = [np.ones(2, dtype=np.float32), np.ones(3, dtype=np.float32)]
SEQUENCES = train_batch().sequences[:1]

# hook -> arguments that vime may call it with
CALLS = {
    "BUFFER_FILTER": lambda: ((None, 3, pair(), 1), {}),
    "ROLLOUT": lambda: ((None, 3, None), {"evaluation": False}),
    "GENERATE": lambda: ((None, sample(), {}), {"evaluation": False}),
    "REWARD": lambda: ((None, sample()), {}),
    "GROUP_REWARD": lambda: ((None, pair()[0]), {}),
    "SAMPLE_HOOK": lambda: ((None, sample()), {}),
    "DYNAMIC_FILTER": lambda: ((None, pair()[0]), {}),
    "SAMPLE_FILTER": lambda: ((None, pair()), {}),
    "ALL_SAMPLES": lambda: ((None, pair()[0], None), {}),
    "CONVERT": lambda: ((None, pair()[0]), {}),
    "POST_PROCESS": lambda: ((None, pair()[0]), {}),
    "REDUCER": lambda: ((None, MASKS, False), {}),
    "DATA_POSTPROCESS": lambda: ((None, 3, train_batch()), {}),
    "LOG": lambda: ((3, None, [], {}, 1.0), {}),
    "EVAL_LOG": lambda: ((3, None, {}, {}), {}),
    "MODEL": lambda: ((None, torch.nn.Linear(1, 1)), {}),
    "ADVANTAGE": lambda: ((None, SEQUENCES, [torch.zeros(2)], None), {}),
    "LOSS": lambda: ((None, LOGP), LOSS_KNOWN),
    "TIS": lambda: ((None,), TIS_KNOWN),
}


def popped(args, rollout_id, buffer, num_samples):
    return [buffer.pop(0)]


def popped_all(args, rollout_id, buffer, num_samples):
    return [buffer.pop(0), buffer.pop(0)]


def same(*args, **kwargs):
    return args[1]


def drop_a_group(args, groups):
    groups.pop()


def replace_a_sample(args, groups):
    groups[0][0] = copy.copy(groups[0][0])


def always(value):
    return lambda *args, **kwargs: value


NAN = float("nan")

WRONG = [  # hook, what it returns, what the error says
    ("BUFFER_FILTER", always(None), "returned None. It must return at most num_samples groups"),
    ("BUFFER_FILTER", lambda a, r, b, n: b.pop(0), "returned a list of Sample"),
    ("BUFFER_FILTER", lambda a, r, b, n: [[]], "returned an empty list as group 0"),
    ("BUFFER_FILTER", lambda a, r, b, n: b[:1], "left the returned groups in the buffer"),
    ("BUFFER_FILTER", lambda a, r, b, n: copy.deepcopy(b[:1]), "that were not in the buffer"),
    ("BUFFER_FILTER", popped_all, "returned 2 groups, but at most 1 were asked for"),
    ("BUFFER_FILTER", lambda *a: [popped(*a)[0][:1] * 2], "returned one sample twice"),
    ("ROLLOUT", always(None), "returned None. It must return RolloutFnTrainOutput or a list of"),
    ("ROLLOUT", always([]), "returned an empty list"),
    ("ROLLOUT", always([sample()]), "returned a list of Sample"),
    ("ROLLOUT", always([[sample()], []]), "returned an empty list as group 1"),
    ("ROLLOUT", always([[sample(), "x"]]), "returned 'x' in group 0"),
    ("ROLLOUT", always(RolloutFnTrainOutput([sample()])), "returned a list of Sample"),
    ("ROLLOUT", always(RolloutFnEvalOutput({})), "returned a RolloutFnEvalOutput"),
    ("GENERATE", always(None), "returned None. It must return the Sample or a non-empty list"),
    ("GENERATE", always([]), "returned an empty list"),
    ("GENERATE", always("text"), "returned 'text'"),
    ("GENERATE", lambda a, s, p, **k: [s, None], "returned None"),
    ("GENERATE", always(sample(index=None)), "returned a Sample without index"),
    ("GENERATE", always(sample(group=None)), "returned a Sample of group None for group 0"),
    ("GENERATE", always(sample(loss_mask=[1])), "with 1 loss_mask for 2 response tokens"),
    ("GENERATE", always(Sample(index=0, group_index=0, response_length=3)), "3 and 0 tokens"),
    ("REWARD", always(None), "returned None, which is no reward. It must return a finite number"),
    ("REWARD", always(NAN), "returned nan, which is no reward"),
    ("REWARD", always([1.0]), "returned a list of float, which is no reward"),
    ("REWARD", always({}), "returned an empty dict"),
    ("GROUP_REWARD", always(None), "returned None for 2 samples. It must return a list with one"),
    ("GROUP_REWARD", always(1.0), "returned 1.0 for 2 samples"),
    ("GROUP_REWARD", always([1.0]), "returned 1 rewards for 2 samples"),
    ("SAMPLE_HOOK", always({"a": 1}), "returned a dict. It must return None to keep the sample"),
    ("SAMPLE_HOOK", always(Sample()), "returned a Sample without index"),
    ("SAMPLE_HOOK", always(sample(rollout_log_probs=[0.0])), "1 rollout_log_probs for 2 response"),
    ("DYNAMIC_FILTER", always(None), "returned None as its verdict. It must return a bool"),
    ("DYNAMIC_FILTER", same, "returned a list of Sample as its verdict"),
    ("DYNAMIC_FILTER", always(NAN), "returned nan as its verdict"),
    ("DYNAMIC_FILTER", always(torch.ones(2)), "returned a Tensor as its verdict"),
    ("DYNAMIC_FILTER", always(DynamicFilterOutput(None)), "returned None as its verdict"),
    ("SAMPLE_FILTER", lambda a, g: list(g), "returned a list of list, which vime does not use"),
    ("SAMPLE_FILTER", drop_a_group, "removed, replaced or moved samples. It must return None"),
    ("SAMPLE_FILTER", replace_a_sample, "removed, replaced or moved samples"),
    ("ALL_SAMPLES", lambda a, s, d: s[:1], "returned a list of Sample, which vime does not use"),
    (
        "CONVERT",
        always(None),
        "returned None. It must return a TrainBatch or a dict of the",
    ),
    ("CONVERT", same, "returned a list of Sample"),
    ("CONVERT", always({}), "returned a dict that lacks tokens, response_lengths, rewards"),
    ("CONVERT", always(columns(reward=[1])), "has unknown columns reward"),
    ("CONVERT", always(columns(rewards=[])), "empty or not equally long"),
    ("CONVERT", always(columns(rewards=1.0)), "empty or not equally long"),
    ("CONVERT", always(columns(rewards=[NAN])), "row 0 has the reward nan"),
    ("CONVERT", always(columns(rewards=[None])), "row 0 has values of another kind"),
    ("CONVERT", always(columns(tokens=[1])), "row 0 has values of another kind"),
    ("CONVERT", always(columns(response_lengths=[3])), "row 0 has response_lengths 3 for 3 tokens"),
    ("CONVERT", always(columns(loss_masks=[[1]])), "row 0 has 1 loss_masks for a response of 2"),
    ("POST_PROCESS", always(None), "returned None. It must return (raw rewards, scores)"),
    ("POST_PROCESS", always([1.0, 1.0]), "returned a list of float"),
    ("POST_PROCESS", always(([1.0] * 2, [1.0])), "2 raw rewards and 1 scores for 2 samples"),
    ("POST_PROCESS", always(([1.0] * 2, [1.0, NAN])), "returned nan, which is not finite"),
    ("POST_PROCESS", always(([1.0] * 2, [1.0, None])), "returned a tuple of list"),
    ("REDUCER", always(None), "returned None. It must return a list of arrays: the weights [R]"),
    ("REDUCER", always([]), "returned weights of shapes []"),
    ("REDUCER", always([np.ones(2)] * 2), "shapes [(2,), (2,)] for masks of shapes [(2,), (3,)]"),
    ("REDUCER", lambda a, m, p: [x * NAN for x in m], "returned a weight that is not finite"),
    ("DATA_POSTPROCESS", always(3), "returned 3. It must return a TrainBatch"),
    ("DATA_POSTPROCESS", always(first_sequence(weight=np.ones(1))), "1 entries of weight"),
    ("DATA_POSTPROCESS", always(first_sequence(weight=np.ones(2) * NAN)), "weight that is not"),
    (
        "DATA_POSTPROCESS",
        lambda a, r, b: dataclasses.replace(b, sequences=b.sequences[:1]),
        "whose steps do not name positions below 1 once each",
    ),
    ("LOG", lambda i, a, s, metrics, t: metrics, "returned an empty dict. It must return None, or"),
    ("EVAL_LOG", lambda i, a, data, metrics: metrics, "returned an empty dict"),
    ("MODEL", always(None), "returned None. It must return the chunk of Megatron's model"),
    ("MODEL", always(torch.nn.Linear), "returned a type"),
    ("ADVANTAGE", always(None), "returned None. It must return a list with one tensor [R]"),
    ("ADVANTAGE", always([torch.zeros(3)]), "tensors of shapes [(3,)]; expected [(2,)]"),
    ("ADVANTAGE", always([0.0]), "tensors of shapes [()]; expected [(2,)]"),
    ("ADVANTAGE", always([torch.full((2,), NAN)]), "returned an advantage that is not finite"),
    ("LOSS", always(None), "returned None. It must return (loss [T], dict of [T])"),
    ("LOSS", lambda a, x, **k: x.sum(), "returned a Tensor"),
    ("LOSS", lambda a, x, **k: (x.sum(), {}), "the shape () for the loss, but the tokens have"),
    ("LOSS", lambda a, x, **k: (x, {"a": 1}), "returned 1 for a"),
    ("LOSS", lambda a, x, **k: (x.detach(), {}), "returned a loss without a gradient"),
    ("TIS", always(None), "returned None. It must return (loss [T], dict of [T])"),
    ("TIS", lambda a, *, pg_loss, **k: (pg_loss.mean(), {}), "the shape () for the loss"),
]


@pytest.mark.parametrize(("name", "make", "words"), WRONG)
def test_the_error_for_a_wrong_answer_names_flag_path_answer_and_expectation(name, make, words):
    args, kwargs = CALLS[name]()
    with pytest.raises(ReturnError) as error:
        called(HOOKS[name], make, *args, **kwargs)
    said = str(error.value)
    assert said.startswith(f"--the-flag {HERE}.answer ")
    assert words in said
    assert f". It must return {HOOKS[name].returns}." in said


def test_every_hook_that_judges_its_answer_has_wrong_ones_here():
    judged = {name for name, hook in HOOKS.items() if hook.check}
    assert {name for name, *_ in WRONG} == judged == set(CALLS)


RIGHT = [
    ("BUFFER_FILTER", popped),
    ("BUFFER_FILTER", always([])),
    ("BUFFER_FILTER", lambda *a: [list(popped(*a)[0])]),
    ("ROLLOUT", always(pair())),
    ("ROLLOUT", always(RolloutFnTrainOutput(pair()))),
    ("GENERATE", same),
    ("GENERATE", lambda a, s, p, **k: [s, copy.deepcopy(s)]),
    ("REWARD", always(1)),
    ("REWARD", always(np.float32(0.5))),
    ("REWARD", always({"score": 1.0})),
    ("GROUP_REWARD", always([1.0, None])),
    ("SAMPLE_HOOK", always(None)),
    ("SAMPLE_HOOK", lambda a, s: copy.deepcopy(s)),
    ("DYNAMIC_FILTER", always(True)),
    ("DYNAMIC_FILTER", always(np.bool_(False))),
    ("DYNAMIC_FILTER", always(torch.tensor(True))),
    ("DYNAMIC_FILTER", always(DynamicFilterOutput(False, "dull"))),
    ("SAMPLE_FILTER", always(None)),
    ("SAMPLE_FILTER", same),
    ("ALL_SAMPLES", always(None)),
    ("CONVERT", always(columns(loss_masks=[[0, 1]], teacher_log_probs=None))),
    ("CONVERT", lambda a, s: train_batch()),
    ("POST_PROCESS", always(([1, 0], np.zeros(2)))),
    ("REDUCER", lambda a, m, p: [x.tolist() for x in m]),
    ("DATA_POSTPROCESS", always(None)),
    ("DATA_POSTPROCESS", lambda a, r, b: b),
    ("LOG", always(None)),
    ("LOG", always(np.bool_(True))),
    ("EVAL_LOG", always(False)),
    ("MODEL", same),
    ("ADVANTAGE", always([[0.0, 1.0]])),
    ("LOSS", lambda a, x, **k: (x, {"a": x})),
    ("TIS", lambda a, *, pg_loss, **k: (pg_loss, {})),
]


@pytest.mark.parametrize(("name", "make"), RIGHT)
def test_a_right_answer_comes_back_as_it_is(name, make):
    args, kwargs = CALLS[name]()
    seen = []

    def kept(*args, **kwargs):
        seen.append(make(*args, **kwargs))
        return seen[0]

    assert called(HOOKS[name], kept, *args, **kwargs) is seen[0]


def test_an_evaluation_must_return_the_output_of_one():
    with pytest.raises(ReturnError, match="returned a list of list for an evaluation"):
        called(rollout.ROLLOUT, always(pair()), None, 3, None, evaluation=True)
    found = RolloutFnEvalOutput({"held": {}})
    assert called(rollout.ROLLOUT, always(found), None, 3, None, evaluation=True) is found


@pytest.mark.parametrize("name", CALLS)
def test_a_plain_function_that_returns_a_coroutine_is_awaited_or_refused(name):
    args, kwargs = CALLS[name]()
    kind = ReturnError if HOOKS[name].may_await else PluginError
    words = "returned" if HOOKS[name].may_await else "a coroutine, which vime cannot await here"
    with pytest.raises(kind, match=words):  # args[:2] is no answer to any hook
        called(HOOKS[name], lambda *a, **k: asynchronous(a[:2]), *args, **kwargs)


def test_a_function_gets_an_optional_argument_only_if_it_takes_it():
    for name, seen in (("without_evaluation", None), ("with_evaluation", True)):
        given = sample()
        plugin = Plugin("--the-flag", f"{HERE}.{name}", rollout.GENERATE)
        assert asyncio.run(plugin.call(None, given, {}, evaluation=True)) is given
        assert given.metadata.get("seen") is seen


def without_evaluation(args, sample, sampling_params):
    return sample


def with_evaluation(args, sample, sampling_params, evaluation=False):
    sample.metadata["seen"] = evaluation
    return sample


class Source:
    def __init__(self, args):
        self.answer = args

    def get_samples(self, num_samples):
        return self.answer

    add_samples = save = load = __len__ = lambda self, *args: 0


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        (None, "get_samples() returned None. It must return a list of groups"),
        ([], "get_samples() returned an empty list"),
        ([sample()], "get_samples() returned a list of Sample"),
        ([[sample()] * 2], "get_samples() returned one Sample object twice"),
        ([[sample(index=None)]], "get_samples() returned a Sample without index"),
    ],
)
def test_a_data_source_must_give_groups_of_new_samples(groups, words):
    plugin = Plugin("--data-source-path", f"{HERE}.Source", rollout.DATA_SOURCE)
    with pytest.raises(ReturnError, match=re.escape(words)):
        plugin.call_method(plugin(groups), "get_samples", 2)


def no_source(args):
    return []


def test_a_function_in_place_of_a_data_source_must_make_one():
    plugin = Plugin("--data-source-path", f"{HERE}.no_source", rollout.DATA_SOURCE)
    with pytest.raises(ReturnError, match="an empty list without get_samples, add_samples"):
        plugin(None)


# -- the filter of the founding document -----------------------------------------------------------


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

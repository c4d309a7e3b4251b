"""Users' functions in training: refused at the start if they do not fit, called as documented."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.unit.fake_engine import make_config
from vime.algorithms.policy import one_sequence
from vime.backends.megatron.training.losses import objective_of
from vime.config.fields import flags_in
from vime.config.plugins import check_plugins
from vime.config.sections.algorithm import AlgorithmConfig
from vime.config.view import ArgsView
from vime.rollout.train_data import make_train_batch
from vime.types import Sample, Status

HERE = __name__


def loss(args, logp_T, *, adv_T, **known):
    return -adv_T * logp_T, {}


def advantage(args, sequences, old_logp, ref_logp):
    return [old * 0 + s.reward for s, old in zip(sequences, old_logp, strict=True)]


def correct(args, *, pg_loss, train_log_probs, rollout_log_probs, sequence_sum):
    return pg_loss, {}


def sum_of_tokens(args, loss_masks, per_token):
    return [mask * args.rollout_batch_size for mask in loss_masks]


def too_short(args):
    return None


def named(**fields):
    return make_config("none", algorithm=fields)


def test_functions_that_fit_are_accepted():
    paths = {"custom_loss_path": "loss", "custom_advantage_path": "advantage"}
    cfg = named(**{field: f"{HERE}.{name}" for field, name in paths.items()})
    assert check_plugins(cfg) == []
    assert cfg.algorithm.plugin("custom_loss_path").function is loss
    assert cfg.algorithm.plugin("custom_tis_path") is None
    cfg = named(custom_tis_path=f"{HERE}.correct", use_tis=True)
    assert check_plugins(cfg) == []


FLAGS = {name: spec.name for name, spec in flags_in(AlgorithmConfig).items() if spec.hook}


def nothing():
    return None


@pytest.mark.parametrize(("field", "flag"), FLAGS.items())
def test_a_function_that_does_not_fit_is_refused_with_its_flag(field, flag):
    more = {"use_tis": True} if field == "custom_tis_path" else {}
    [problem] = check_plugins(named(**{field: f"{HERE}.nothing"}, **more))
    assert problem.startswith(f"{flag} {HERE}.nothing")
    assert "Expected: f(args" in problem


def test_every_example_fits_its_flag():
    import examples.hooks.training_hooks as examples

    fields = {
        "megatron_init_path": "print_rank",
        "model_provider_path": "with_embeddings_held",
        "before_log_probs_path": "announce_pass",
        "before_train_step_path": "start_gently",
    }
    paths = {field: f"{examples.__name__}.{name}" for field, name in fields.items()}
    assert check_plugins(named(**paths)) == []
    assert set(fields.values()) == {
        name for name, value in vars(examples).items() if inspect.isfunction(value)
    }
    optimizer = SimpleNamespace(param_groups=[{"lr": 1.0}])
    before = named(**paths).algorithm.plugin("before_train_step_path")
    before(SimpleNamespace(lr=1e-3), 1, 0, [], optimizer, None)
    assert optimizer.param_groups == [{"lr": 5e-4}]


def test_the_examples_in_the_documentation_work(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs/algorithms.md").read_text()
    teacher_code, loss_code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    made: dict = {}
    exec(teacher_code, made)
    samples = [SimpleNamespace(get_reward_value=lambda args: 0.5)] * 2
    assert made["only_the_teacher"](None, samples) == ([0.5, 0.5], [0.0, 0.0])
    (tmp_path / "mine_of_docs.py").write_text(loss_code)
    monkeypatch.syspath_prepend(tmp_path)
    cfg = named(
        custom_loss_path="mine_of_docs.loss", custom_advantage_path="mine_of_docs.advantage"
    )
    assert check_plugins(cfg) == []
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    out = objective_of(cfg)(
        logp,
        old_logp_T=logp.detach(),
        adv_T=torch.ones(2),
        entropy_T=torch.ones(2),
        ref_logp_T=None,
        rollout_logp_T=torch.tensor([-1.0, -2.02]),
        sequence_sum=one_sequence,
    )
    assert out.value_T.tolist() == [1.0, 2.0]
    sequence = SimpleNamespace(reward=2.0, response_length=2)
    half = [torch.tensor([0.5, 0.25]).log()]
    advantages = cfg.algorithm.plugin("custom_advantage_path")
    [adv] = advantages(ArgsView(cfg), [sequence], half, None)
    torch.testing.assert_close(adv, torch.tensor([1.0, 1.5]))


def test_the_users_weights_reach_the_batch():
    cfg = named(custom_reducer_path=f"{HERE}.sum_of_tokens")
    group = [
        Sample(
            group_index=0,
            index=i,
            tokens=[1, 2, 3],
            response_length=2,
            reward=float(i),
            status=Status.COMPLETED,
        )
        for i in range(2)
    ]
    batch = make_train_batch(ArgsView(cfg), [group], 0)
    assert [s.weight.tolist() for s in batch.sequences] == [[cfg.batch.prompts] * 2] * 2

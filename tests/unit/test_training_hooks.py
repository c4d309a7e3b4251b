"""Users' functions in the loss: refused at start where they do not fit, called as documented."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.unit.fake_engine import make_config
from vime.algorithms.advantages import Estimator
from vime.algorithms.hooks import TrainingHooks, user_advantages, user_loss
from vime.algorithms.policy import one_sequence
from vime.config.view import ArgsView
from vime.rollout.train_data import make_train_batch
from vime.rollout.training_hooks import check_training_hooks, training_hooks
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


def test_functions_that_fit_are_loaded():
    cfg = named(
        custom_loss_path=f"{HERE}.loss",
        custom_advantage_path=f"{HERE}.advantage",
        custom_reducer_path=f"{HERE}.sum_of_tokens",
    )
    assert check_training_hooks(cfg) == []
    hooks = training_hooks(cfg)
    assert (hooks.loss.__name__, hooks.advantage.__name__) == ("loss", "advantage")
    assert hooks.correct is None
    assert hooks.args.config is cfg
    cfg = named(custom_tis_path=f"{HERE}.correct", use_tis=True)
    assert check_training_hooks(cfg) == []
    assert training_hooks(cfg).correct.__name__ == "correct"


@pytest.mark.parametrize(
    ("field", "flag"),
    [
        ("custom_loss_path", "--custom-loss-function-path"),
        ("custom_advantage_path", "--custom-advantage-function-path"),
        ("custom_tis_path", "--custom-tis-function-path"),
        ("custom_reducer_path", "--custom-pg-loss-reducer-function-path"),
        ("model_provider_path", "--custom-model-provider-path"),
        ("before_log_probs_path", "--custom-megatron-before-log-prob-hook-path"),
        ("before_train_step_path", "--custom-megatron-before-train-step-hook-path"),
    ],
)
def test_a_function_that_does_not_fit_is_refused_with_its_flag(field, flag):
    more = {"use_tis": True} if field == "custom_tis_path" else {}
    [problem] = check_training_hooks(named(**{field: f"{HERE}.too_short"}, **more))
    assert problem.startswith(f"{flag} {HERE}.too_short")
    assert "Expected: f(args, " in problem


def test_every_function_of_the_examples_fits_its_flag():
    import examples.hooks.training_hooks as examples

    fields = {
        "megatron_init_path": "print_rank",
        "model_provider_path": "with_embeddings_held",
        "before_log_probs_path": "announce_pass",
        "before_train_step_path": "start_gently",
    }
    paths = {field: f"{examples.__name__}.{name}" for field, name in fields.items()}
    assert check_training_hooks(named(**paths)) == []
    assert set(fields.values()) == {
        name for name, value in vars(examples).items() if inspect.isfunction(value)
    }
    hooks = training_hooks(named(**paths))
    optimizer = SimpleNamespace(param_groups=[{"lr": 1.0}])
    hooks.before_train_step(SimpleNamespace(lr=1e-3), 1, 0, [], optimizer, None)
    assert optimizer.param_groups == [{"lr": 5e-4}]


def test_the_documents_examples_work():
    text = (Path(__file__).parents[2] / "docs/algorithms.md").read_text()
    teacher_code, loss_code, estimator_code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    made: dict = {}
    exec(teacher_code, made)
    samples = [SimpleNamespace(get_reward_value=lambda args: 0.5)] * 2
    assert made["only_the_teacher"](None, samples) == ([0.5, 0.5], [0.0, 0.0])
    exec(loss_code, made)
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    objective = user_loss(TrainingHooks(loss=made["loss"]))
    out = objective(
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
    hooks = TrainingHooks(advantage=made["advantage"])
    [adv] = user_advantages(hooks, [sequence], half, None)
    torch.testing.assert_close(adv, torch.tensor([1.0, 1.5]))
    registry: dict = {}
    exec(estimator_code, {"Tensor": Tensor, "Estimator": Estimator, "ESTIMATORS": registry})
    scores = registry["best_of_group"].baseline(torch.tensor([1.0, 3.0, 2.0]))
    assert scores.tolist() == [0.0, 1.0, 0.0]


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

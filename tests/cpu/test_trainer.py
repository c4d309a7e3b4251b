"""The trainer alone: it learns, starts on-policy, skips steps that are not finite, resumes."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny import make_config, write_tiny_hf
from training import hf_model, named_weights, samples_of

from vime.data.batching import build_train_batch
from vime.errors import ConfigError

BATCH = {
    "prompts": 4,
    "samples_per_prompt": 4,
    "dynamic": True,
    "max_tokens_per_gpu": 512,
    "num_rollout": 8,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_hf(tmp_path_factory.mktemp("trainer"), tied=True, num_hidden_layers=2)


def test_a_trainer_does_what_its_docstrings_say(folder: Path, tmp_path: Path) -> None:
    """One process runs every case, because importing Megatron takes seconds."""
    run_ranks(every_case, 1, folder=folder, out=str(tmp_path))


def every_case(rank: int, world: int, port: int, folder: Path, out: str) -> None:
    from ranks import free_port

    from vime.backends.megatron.trainer import MegatronTrainer

    def trainer(**sections: Any) -> MegatronTrainer:
        sections = {"batch": BATCH, "optimizer": {"lr": 1e-3}} | sections
        model = {"hf_checkpoint": str(folder), "dtype": sections.pop("dtype", "auto")}
        cfg = make_config(folder, model=model, **sections)
        return MegatronTrainer(cfg, master_port=free_port())

    for case in (
        grpo_raises_the_probability_of_rewarded_answers,
        the_first_step_is_on_policy,
        a_penalty_needs_and_gets_the_old_log_probabilities,
        sft_learns_the_demonstrations,
        a_step_that_is_not_finite_changes_nothing,
        a_finite_loss_without_a_finite_gradient_names_its_sample_too,
        a_step_without_a_token_to_learn_from_has_gradient_0,
        an_out_of_memory_error_names_the_flags,
        the_old_policy_may_be_that_of_the_engines,
        the_old_policy_may_be_that_of_the_rollout,
        the_reference_follows_the_actor,
        the_actor_approaches_a_teacher_without_a_reward,
        a_teacher_judges_each_token_under_every_estimator,
        functions_of_a_user_replace_those_of_vime,
        functions_of_a_user_are_called_at_the_right_time,
        a_resumed_run_takes_the_same_steps,
        a_critic_learns_first_then_beside_the_actor_and_resumes,
        warm_up_begins_above_zero,
        norms_have_no_weight_decay,
    ):
        print(case.__name__, flush=True)
        case(trainer, Path(out))


def batch_of(trainer: Any, groups: list | None = None, rollout_id: int = 0) -> Any:
    return build_train_batch(groups or samples_of(4, 4), trainer.cfg, rollout_id)


def logps(trainer: Any, batch: Any) -> list[float]:
    """The mean log-probability of each sequence's response."""
    from vime.backends.megatron.training.rollout_columns import RolloutColumns

    columns = RolloutColumns(batch, trainer.cfg, trainer.device)
    column = trainer.actor.logps(columns, list(batch.steps))
    rows = columns.table.responses
    return [float(column[rows[p]].mean()) for p in range(len(batch.sequences))]


def grpo_raises_the_probability_of_rewarded_answers(trainer: Any, out: Path) -> None:
    t = trainer(algorithm={"use_kl_loss": True, "kl_loss_type": "low_var_kl"})
    batch = batch_of(t)
    before = logps(t, batch)
    assert t.start_rollout_id == 0
    for _ in range(4):
        metrics = t.train(batch)
    gain = np.subtract(logps(t, batch), before)
    rewarded = np.array([s.raw_reward for s in batch.sequences]) == 1
    assert gain[rewarded].mean() > 0.1 > -0.1 > gain[~rewarded].mean()
    assert metrics["train/kl_loss"] > 0  # the actor has moved and the reference has not
    apart = metrics["rollout/log_probs"] - metrics["rollout/ref_log_probs"]
    assert metrics["rollout/kl"] == pytest.approx(apart, abs=1e-5) != 0
    t.close()


def the_first_step_is_on_policy(trainer: Any, out: Path) -> None:
    steps = BATCH | {"steps_asked": 2}
    t = trainer(algorithm={"use_kl_loss": True, "kl_loss_type": "k3"}, batch=steps)
    groups = samples_of(4, 4)
    for sample, logp in zip(sum(groups, []), logps_of_tokens(t, batch_of(t)), strict=True):
        sample.rollout_log_probs = logp
    groups[1][1].rollout_log_probs = None  # as from a plugin without them
    groups[1][2].rollout_log_probs[0] = float("-inf")
    metrics = t.train(batch_of(t, groups))
    assert metrics["train/ppo_kl_first_step"] == metrics["train/kl_loss_first_step"] == 0.0
    assert metrics["train/ppo_kl"] != 0.0
    assert metrics["rollout/log_probs"] == pytest.approx(metrics["rollout/ref_log_probs"], abs=1e-6)
    assert metrics["rollout/kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["perf/actor_train_tflops"] > 0
    assert metrics["train/train_rollout_logprob_abs_diff_max"] < 1e-5
    for name in ("loss", "pg_loss", "pg_clipfrac", "entropy_loss", "grad_norm", "lr"):
        assert f"train/{name}" in metrics
    for name in ("log_probs_time", "ref_log_probs_time", "actor_train_time"):
        assert metrics[f"perf/{name}"] > 0
    t.close()


def logps_of_tokens(trainer: Any, batch: Any) -> list[list[float]]:
    from vime.backends.megatron.training.rollout_columns import RolloutColumns

    columns = RolloutColumns(batch, trainer.cfg, trainer.device)
    column = trainer.actor.logps(columns, list(batch.steps))
    return [column[columns.table.responses[p]].tolist() for p in range(len(batch.sequences))]


def a_penalty_needs_and_gets_the_old_log_probabilities(trainer: Any, out: Path) -> None:
    for estimator in ("reinforce_plus_plus", "reinforce_plus_plus_baseline", "rloo"):
        t = trainer(algorithm={"kl_coef": 0.1, "advantage_estimator": estimator})
        metrics = t.train(batch_of(t))
        assert abs(metrics["train/ppo_kl"]) < 1e-6
        assert metrics["rollout/advantages"] == pytest.approx(0, abs=0.3)
        assert metrics["train/grad_norm"] > 0
        t.close()


def sft_learns_the_demonstrations(trainer: Any, out: Path) -> None:
    t = trainer(algorithm={"loss_type": "sft_loss"}, optimizer={"lr": 5e-3})
    groups = samples_of(4, 4)
    for sample in sum(groups, []):
        sample.reward = None
    losses = [t.train(batch_of(t, groups))["train/loss"] for _ in range(6)]
    assert losses[-1] < 0.8 * losses[0]
    metrics = t.train(batch_of(t, groups))
    assert "train/train_rollout_logprob_abs_diff" not in metrics
    assert "train/pg_loss" not in metrics
    t.close()


def a_step_that_is_not_finite_changes_nothing(trainer: Any, out: Path) -> None:
    from vime.backends.megatron.training.update import MAX_SKIPPED_STEPS

    t = trainer()
    batch = batch_of(t)
    broken = dataclasses.replace(
        batch,
        sequences=tuple(dataclasses.replace(s, reward=float("inf")) for s in batch.sequences),
    )
    before = named_weights(t.actor)
    for _ in range(MAX_SKIPPED_STEPS - 1):
        assert t.train(broken)["train/skipped_steps"] == 1
    assert all(torch.equal(w, before[n]) for n, w in named_weights(t.actor).items())
    assert t.train(batch)["train/skipped_steps"] == 0  # a good step starts the count anew
    spoilt = (*batch.sequences[:5], broken.sequences[5], *batch.sequences[6:])
    for _ in range(MAX_SKIPPED_STEPS - 1):
        t.train(broken)
    with pytest.raises(
        RuntimeError, match="5 optimizer steps in a row were not finite.*samples 5: loss or.*--lr"
    ):
        t.train(dataclasses.replace(batch, sequences=spoilt))
    t.close()


def a_finite_loss_without_a_finite_gradient_names_its_sample_too(trainer: Any, out: Path) -> None:
    loss = {"custom_loss_path": f"{__name__}.steep"}
    t = trainer(algorithm={"use_rollout_logprobs": True, **loss})
    groups = samples_of(4, 4)
    for sample in sum(groups, []):
        sample.rollout_log_probs = [-4.0] * sample.response_length
    groups[1][1].rollout_log_probs[0] = -9999.0
    before = named_weights(t.actor)
    with warnings_of("vime.backends.megatron") as said:
        assert t.train(batch_of(t, groups))["train/skipped_steps"] == 1
    [line] = said
    assert re.search(r"samples 5: loss or gradient not finite\): loss -?\d.*norm nan", line), line
    assert all(torch.equal(w, before[n]) for n, w in named_weights(t.actor).items())
    t.close()


def steep(args: Any, logp_T: Any, *, old_logp_T: Any, adv_T: Any, **known: Any) -> Any:
    """A finite loss with an infinite gradient at tokens that the engine found impossible."""
    is_steep_T = old_logp_T < -1000
    root_T = torch.where(is_steep_T, logp_T - logp_T.detach(), 1.0).sqrt()
    return torch.where(is_steep_T, root_T, 0.0) - adv_T * logp_T, {}


@contextmanager
def warnings_of(name: str) -> Iterator[list[str]]:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger(name).addHandler(handler)
    yield said
    logging.getLogger(name).removeHandler(handler)


def a_step_without_a_token_to_learn_from_has_gradient_0(trainer: Any, out: Path) -> None:
    t = trainer(optimizer={"lr": 1e-3, "weight_decay": 0.0})
    groups = samples_of(4, 4)
    for sample in sum(groups, []):
        sample.remove_sample = True
    before = named_weights(t.actor)
    metrics = t.train(batch_of(t, groups))
    assert (
        metrics["train/loss"] == metrics["train/grad_norm"] == metrics["train/skipped_steps"] == 0
    )
    assert all(np.isfinite(v) for v in metrics.values())
    assert all(torch.equal(w, before[n]) for n, w in named_weights(t.actor).items())
    t.close()


def an_out_of_memory_error_names_the_flags(trainer: Any, out: Path) -> None:
    t = trainer()

    def too_much(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.25 GiB.")

    t.actor.objective = too_much
    with pytest.raises(
        ConfigError, match=r"--max-tokens-per-gpu 512 -> \d+ \(est(.|\n)*Tried to allocate 9.25 GiB"
    ):
        t.train(batch_of(t))
    t.close()


def the_old_policy_may_be_that_of_the_engines(trainer: Any, out: Path) -> None:
    t = trainer(algorithm={"use_rollout_logprobs": True})
    groups = samples_of(4, 4)
    for sample, logp in zip(sum(groups, []), logps_of_tokens(t, batch_of_plain(t)), strict=True):
        sample.rollout_log_probs = [x - 0.1 for x in logp]
    metrics = t.train(batch_of(t, groups))
    assert metrics["train/ppo_kl_first_step"] == pytest.approx(-0.1, abs=1e-5)
    assert metrics["train/train_rollout_logprob_abs_diff"] == pytest.approx(0.1, abs=1e-5)
    apart = metrics["rollout/log_probs"] - metrics["rollout/rollout_log_probs"]
    assert apart == pytest.approx(0.1, abs=1e-5)
    t.close()


def batch_of_plain(trainer: Any) -> Any:
    """A batch without log-probabilities from an engine."""
    return build_train_batch(samples_of(4, 4), make_config("unused", batch=BATCH), 0)


def the_old_policy_may_be_that_of_the_rollout(trainer: Any, out: Path) -> None:
    """As in the asynchronous loop, the weights of the first rollout also made the second."""
    t = trainer(algorithm={"keep_old_actor": True})
    sampled = logps_of_tokens(t, batch_of_plain(t))

    def batch_made_by(version: int, logps: list | None = sampled) -> Any:
        groups = samples_of(4, 4)
        for sample, logp in zip(sum(groups, []), logps or [None] * 16, strict=True):
            sample.rollout_log_probs = logp
            sample.weight_versions = [version] * sample.response_length
        return batch_of(t, groups)

    t.actor.sent.keep(0)
    first = t.train(batch_made_by(0))
    assert first["train/ppo_kl_first_step"] == 0.0  # the same weights, so no second pass
    t.actor.sent.keep(1)
    before = named_weights(t.actor)
    second = t.train(batch_made_by(0))
    assert second["train/train_rollout_logprob_abs_diff_max"] < 1e-5
    assert second["rollout/log_probs"] == pytest.approx(first["rollout/log_probs"], abs=1e-5)
    assert abs(second["train/ppo_kl_first_step"]) > 1e-3
    assert any(not torch.equal(w, before[n]) for n, w in named_weights(t.actor).items())
    t.train(batch_made_by(1))
    assert list(t.actor.sent.copies) == [1]
    # a rollout from before the run has no copy: the engine's log-probabilities, or an error
    again = t.train(batch_made_by(0))
    assert again["rollout/rollout_log_probs"] == pytest.approx(first["rollout/log_probs"], abs=1e-5)
    assert again["rollout/log_probs"] != pytest.approx(first["rollout/log_probs"], abs=1e-4)
    refusal = "no copy of weights 0, which generated rollout 0, and sample 0"
    with pytest.raises(ValueError, match=refusal):
        t.train(batch_made_by(0, None))
    t.close()


def the_reference_follows_the_actor(trainer: Any, out: Path) -> None:
    following = {"use_kl_loss": True, "kl_loss_type": "k3", "ref_update_interval": 2}
    t = trainer(algorithm=following, checkpoint={"save": str(out / "following")})
    kl = [t.train(batch_of(t, rollout_id=i))["train/kl_loss"] for i in range(4)]
    assert kl[0] == kl[2] == 0 < min(kl[1], kl[3])
    t.save(3)
    fifth = t.train(batch_of(t, rollout_id=4))
    t.close()
    t = trainer(algorithm=following, checkpoint={"load": str(out / "following")})
    assert t.train(batch_of(t, rollout_id=4))["train/kl_loss"] == fifth["train/kl_loss"] == 0
    t.close()
    from vime.backends.megatron.parallel import shutdown_parallel

    odd = {**following, "ref_update_interval": 3}
    with pytest.raises(ConfigError, match="--ref-update-interval 3.*--ckpt-step"):
        trainer(algorithm=odd, checkpoint={"load": str(out / "following")})
    shutdown_parallel()


def distilling(trainer: Any, out: Path, **algorithm: Any) -> Any:
    """A trainer whose teacher has the actor's architecture but other weights."""
    teacher = write_tiny_hf(out / "teacher", tied=True, num_hidden_layers=2)
    model = hf_model(teacher)
    torch.manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    model.save_pretrained(teacher)
    checkpoint = {"opd_teacher_load": str(teacher)}
    return trainer(algorithm={"use_opd": True, **algorithm}, checkpoint=checkpoint)


def the_actor_approaches_a_teacher_without_a_reward(trainer: Any, out: Path) -> None:
    t = distilling(trainer, out)
    groups = samples_of(4, 4)
    for sample in sum(groups, []):
        sample.reward = 0.0
    batch = batch_of(t, groups)
    found = [t.train(batch) for _ in range(8)]
    taught = [m["rollout/teacher_log_probs"] for m in found]
    assert taught == pytest.approx([taught[0]] * 8, abs=1e-6)  # the teacher does not change
    for m in found:
        apart = m["rollout/log_probs"] - m["rollout/teacher_log_probs"]
        assert m["rollout/opd_kl"] == pytest.approx(apart, abs=1e-5)
        assert m["rollout/advantages"] == pytest.approx(-apart, abs=1e-5)
        assert m["train/ppo_kl"] == pytest.approx(0.0, abs=1e-6)
        assert m["perf/teacher_log_probs_time"] > 0
    apart = [abs(m["rollout/opd_kl"]) for m in found]
    assert apart[-1] < 0.5 * apart[0], apart
    t.close()


def a_teacher_judges_each_token_under_every_estimator(trainer: Any, out: Path) -> None:
    from vime.algorithms.advantages import ESTIMATORS
    from vime.backends.megatron.training.advantages import set_advantages
    from vime.backends.megatron.training.rollout_columns import RolloutColumns

    t = distilling(trainer, out, kl_coef=0.1, opd_kl_coef=0.5)
    batch = batch_of(t)
    for name, estimator in ESTIMATORS.items():
        if estimator.critic:
            continue  # has no values here
        cfg = dataclasses.replace(t.cfg.algorithm, advantage_estimator=name)
        columns = RolloutColumns(batch, t.cfg, t.device)
        columns.old_logp_N = t.actor.logps(columns, list(batch.steps))
        columns.ref_logp_N = t.actor.logps_of(t.actor.reference, batch, columns)
        set_advantages(columns, cfg, t.actor.args)
        alone_N = columns.adv_N
        columns.teacher_logp_N = t.actor.logps_of(t.actor.teacher, batch, columns)
        apart_N = (columns.old_logp_N - columns.teacher_logp_N) * columns.table.mask_N
        assert apart_N.abs().max() > 0.01
        set_advantages(columns, cfg, t.actor.args)
        if not estimator.whiten:
            expected_N = alone_N - 0.5 * apart_N
            torch.testing.assert_close(columns.adv_N, expected_N, rtol=0, atol=1e-6)
            continue
        chosen_N = columns.adv_N[columns.table.mask_N > 0]  # whitened last
        assert not torch.allclose(columns.adv_N, alone_N, atol=1e-2)
        assert (chosen_N.mean().abs(), chosen_N.std()) == pytest.approx((0.0, 1.0), abs=1e-2)
    t.close()


def vanilla(args: Any, logp_T: Any, *, old_logp_T: Any, adv_T: Any, **known: Any) -> Any:
    ratio_T = (logp_T - old_logp_T).exp()
    return -ratio_T * adv_T, {"pg_loss": -ratio_T * adv_T, "ratio": ratio_T}


def spread(args: Any, sequences: Any, old_logp: Any, ref_logp: Any) -> list:
    assert all(len(x) == s.response_length for x, s in zip(old_logp, sequences, strict=True))
    assert all(float(x.max()) < 0 for x in old_logp)
    return [torch.full((s.response_length,), s.reward) for s in sequences]


def functions_of_a_user_replace_those_of_vime(trainer: Any, out: Path) -> None:
    """A loss and advantages that a user wrote out train like vime's own."""
    t = trainer()
    metrics = t.train(batch_of(t))
    expected = named_weights(t.actor)
    t.close()
    t = trainer(
        algorithm={
            "custom_loss_path": f"{__name__}.vanilla",
            "custom_advantage_path": f"{__name__}.spread",
        }
    )
    found = t.train(batch_of(t))
    assert found["train/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert found["train/pg_loss"] == pytest.approx(metrics["train/pg_loss"], abs=1e-5)
    for name, weight in named_weights(t.actor).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=2e-5)
    t.close()


SEEN: list[tuple] = []  # what the functions below were called with


def see_init(args: Any) -> None:
    SEEN.append(("init", torch.distributed.get_world_size()))


def see_model(args: Any, model: Any) -> Any:
    SEEN.append(("model", model.pre_process))
    return model


def see_pass(args: Any, model: Any, store_prefix: str) -> None:
    SEEN.append(("pass", store_prefix))


def see_step(
    args: Any, rollout_id: int, step_id: int, model: Any, optimizer: Any, scheduler: Any
) -> None:
    SEEN.append(("step", rollout_id, step_id, len(model)))
    for group in optimizer.param_groups:
        group["lr"] /= 2


def functions_of_a_user_are_called_at_the_right_time(trainer: Any, out: Path) -> None:
    hooks = {
        "megatron_init_path": f"{__name__}.see_init",
        "model_provider_path": f"{__name__}.see_model",
        "before_log_probs_path": f"{__name__}.see_pass",
        "before_train_step_path": f"{__name__}.see_step",
    }
    t = trainer(batch=BATCH | {"steps_asked": 2}, algorithm={"use_kl_loss": True, **hooks})
    metrics = t.train(batch_of(t))
    assert SEEN == [
        ("init", 1),
        ("model", True),
        ("pass", ""),
        ("pass", "ref_"),
        ("step", 0, 0, 1),
        ("step", 0, 1, 1),
    ]
    assert metrics["train/lr"] == pytest.approx(5e-4)  # the schedule says 1e-3 at each step
    t.close()


def a_resumed_run_takes_the_same_steps(trainer: Any, out: Path) -> None:
    schedule = {"lr": 1e-3, "lr_decay_style": "linear", "lr_warmup_iters": 2}
    saving = {"checkpoint": {"save": str(out / "run")}, "optimizer": schedule}
    t = trainer(**saving)
    for rollout_id in range(2):
        t.train(batch_of(t, samples_of(4, 4, rollout_id)))
    t.save(1)
    straight = t.train(batch_of(t, samples_of(4, 4, 2)))
    t.save_hf(str(out / "hf"))
    expected = named_weights(t.actor)
    t.close()
    t = trainer(checkpoint={"load": str(out / "run")}, optimizer=schedule)
    assert t.start_rollout_id == 2
    resumed = t.train(batch_of(t, samples_of(4, 4, 2)))
    assert resumed["train/lr"] == straight["train/lr"]
    assert resumed["train/loss"] == straight["train/loss"]
    assert all(torch.equal(w, expected[n]) for n, w in named_weights(t.actor).items())
    assert (out / "hf" / "model.safetensors").exists()
    t.close()
    other = {"lr": 7e-4, "beta1": 0.8, "eps": 1e-6, "weight_decay": 0.3}
    t = trainer(checkpoint={"load": str(out / "run")}, optimizer=other)
    for group in t.actor.optimizer.param_groups:  # a flag replaces the saved value
        assert (group["betas"], group["eps"]) == ((0.8, 0.999), 1e-6)
        assert group["weight_decay"] in (0.0, 0.3)
    assert t.train(batch_of(t))["train/lr"] == pytest.approx(7e-4)
    t.close()


def a_critic_learns_first_then_beside_the_actor_and_resumes(trainer: Any, out: Path) -> None:
    ppo = {"advantage_estimator": "ppo", "num_critic_only_steps": 4}
    rates = {"lr": 1e-3, "critic_lr": 3e-3, "critic_lr_warmup_iters": 2}
    saving = {"save": str(out / "ppo"), "async_save": True}
    t = trainer(algorithm=ppo, optimizer=rates, checkpoint=saving)
    before = named_weights(t.actor)
    alone = [t.train(batch_of(t, rollout_id=i)) for i in range(4)]
    assert all(torch.equal(w, before[n]) for n, w in named_weights(t.actor).items())
    assert [m["train/critic_lr"] for m in alone] == pytest.approx([1e-3, 2e-3, 3e-3, 3e-3])
    assert alone[0]["rollout/values"] == alone[0]["rollout/value_explained_variance"] == 0
    assert alone[0]["train/value_loss"] == pytest.approx(0.25)  # half of the mean squared reward
    assert alone[3]["train/value_loss"] < 0.9 * alone[0]["train/value_loss"]
    assert alone[3]["rollout/log_probs"] == pytest.approx(alone[0]["rollout/log_probs"])
    assert "train/loss" not in alone[0]
    assert "perf/actor_train_tok_per_s" not in alone[0]
    both = t.train(batch_of(t, rollout_id=4))
    assert both["train/grad_norm"] > 0
    assert both["train/critic_grad_norm"] > 0
    assert both["train/lr"] == 1e-3
    t.save(4)
    straight = t.train(batch_of(t, rollout_id=5))
    t.finish_saves()
    expected = named_weights(t.actor)
    t.close()
    t = trainer(algorithm=ppo, optimizer=rates, checkpoint={"load": str(out / "ppo")})
    resumed = t.train(batch_of(t, rollout_id=t.start_rollout_id))
    same = [n for n in straight if not n.startswith("perf/")]
    assert {n: resumed[n] for n in same} == {n: straight[n] for n in same}
    assert all(torch.equal(w, expected[n]) for n, w in named_weights(t.actor).items())
    t.close()
    t = trainer(checkpoint={"load": str(out / "ppo")})  # another estimator needs no critic
    assert t.start_rollout_id == 5
    t.close()
    for sharded in (False, True):
        a_float32_head_on_a_bfloat16_critic_resumes(trainer, out / f"half{sharded}", sharded)


def a_float32_head_on_a_bfloat16_critic_resumes(trainer: Any, saved: Path, sharded: bool) -> None:
    sections = {
        "algorithm": {"advantage_estimator": "ppo"},
        "dtype": "bfloat16",
        "parallel": {"use_distributed_optimizer": sharded},
        "checkpoint": {"load": str(saved), "save": str(saved)},
    }

    def state(t: Any) -> list[torch.Tensor]:
        inner = [x.optimizer for x in getattr(t.critic.optimizer, "chained_optimizers", ())]
        inner = inner or [t.critic.optimizer.optimizer]
        main = [p for o in inner for g in o.param_groups for p in g["params"]]
        return [*main, *(v for o in inner for p in main for _, v in sorted(o.state[p].items()))]

    t = trainer(**sections)
    for _ in range(2):
        t.train(batch_of(t))
    t.save(0)
    before = [x.detach().clone() for x in state(t)]
    t.close()
    t = trainer(**sections)
    assert t.start_rollout_id == 1
    assert all(torch.equal(a, b) for a, b in zip(state(t), before, strict=True))
    t.close()


def warm_up_begins_above_zero(trainer: Any, out: Path) -> None:
    t = trainer(optimizer={"lr": 4e-4, "lr_warmup_iters": 3})
    rates = [t.train(batch_of(t))["train/lr"] for _ in range(5)]
    assert rates == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4, 4e-4])
    t.close()


def norms_have_no_weight_decay(trainer: Any, out: Path) -> None:
    t = trainer(optimizer={"lr": 1e-3, "weight_decay": 10.0})
    groups = samples_of(4, 4)
    for sample in sum(groups, []):
        sample.reward = 1.0  # no advantage, so no gradient: only decay moves weights
    before = named_weights(t.actor)
    t.train(batch_of(t, groups))
    for name, weight in named_weights(t.actor).items():
        if weight.ndim == 1:
            assert torch.equal(weight, before[name]), name
        else:
            torch.testing.assert_close(weight, before[name] * 0.99, rtol=1e-5, atol=1e-7)
    t.close()

"""Losses that depend on whole sequences, in every layout, compared with plain autograd.

GSPO with truncated importance weights of sequences, an unbiased KL, and ratios that start from the
engine's or the trainer's log-probabilities. Context parallelism cuts sequences into pieces, which
must change neither loss nor gradient.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import agree_on_port, run_ranks
from tiny import make_config, write_tiny_hf
from training import hf_logps, hf_model, named_gradients, samples_of

from vime.data.batching import build_train_batch

LAYOUTS: list[dict[str, Any]] = [{"cp": 2}, {"pp": 2}, {"tp": 2}, {}]
GSPO = {"advantage_estimator": "gspo", "clip_low": 0.02, "clip_high_asked": 0.02}
CASES: dict[str, dict[str, Any]] = {
    "from the engine": GSPO | {"use_rollout_logprobs": True, "use_opsm": True, "opsm_delta": 0.01},
    "weighed": GSPO
    | {"use_tis": True, "tis_level": "geometric", "tis_clip": 1.01, "mismatch_metrics": True},
}


def config(folder: Path, parallel: dict[str, Any], algorithm: dict[str, Any]) -> Any:
    return make_config(
        folder,
        cluster={"actor_gpus_per_node": 2},
        parallel=parallel,
        batch={
            "prompts": 2,
            "samples_per_prompt": 4,
            "num_rollout": 1,
            "dynamic": True,
            "max_tokens_per_gpu": 60,
        },
        algorithm=algorithm,
        optimizer={"clip_grad": 0.0},
    )


def groups_of(folder: Path) -> list:
    groups = samples_of(2, 4)
    groups[0][1].remove_sample = True
    groups[1][3].loss_mask = [i % 2 for i in range(groups[1][3].response_length)]
    for sample, logp in zip(sum(groups, []), torch.load(folder / "sampled.pt"), strict=True):
        sample.rollout_log_probs = logp
    return groups


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and log-probabilities of an engine that differs a little in each sequence."""
    root = write_tiny_hf(tmp_path_factory.mktemp("estimators"), tied=True, num_hidden_layers=2)
    torch.manual_seed(1)
    model = hf_model(root)
    with torch.no_grad():
        logps = [hf_logps(model, s, 1.0)[0] for g in samples_of(2, 4) for s in g]
    drift = [0.03 * torch.randn(()) + 0.05 * torch.randn(len(x)) for x in logps]
    torch.save([(x + d).tolist() for x, d in zip(logps, drift, strict=True)], root / "sampled.pt")
    return root


def by_autograd(folder: Path, algorithm: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """GSPO as in its paper: each sequence has one ratio, with its own gradient."""
    batch = build_train_batch(groups_of(folder), config(folder, {}, algorithm), 0)
    model = hf_model(folder).double()
    loss = torch.zeros((), dtype=torch.float64)
    for s in batch.sequences:
        mask = torch.as_tensor(s.loss_mask) > 0
        if not mask.any():
            continue
        logp = hf_logps(model, s, 1.0)[0][mask]
        rollout = torch.as_tensor(s.rollout_logp)[mask].double()
        is_tis = algorithm.get("use_tis", False)
        old = logp.detach() if is_tis else rollout
        ratio, adv = (logp - old).mean().exp(), s.reward
        one = -torch.minimum(ratio * adv, ratio.clamp(0.98, 1.02) * adv)
        if is_tis:
            one = one * (old - rollout).mean().exp().clamp(max=1.01)
        elif adv < 0 and (old - logp).mean() > algorithm["opsm_delta"]:
            one = one * 0
        loss = loss + one / len(batch.sequences)
    loss.backward()
    named = [(n, p.grad) for n, p in model.named_parameters() if n != "lm_head.weight"]
    return loss.item(), dict(named)


def train_all(rank: int, world: int, port: int, folder: Path) -> tuple[list[tuple], list[tuple]]:
    """The training runs of both tests in one set of processes, since a start takes seconds."""
    return train(rank, world, folder), train_with_hooks(rank, world, folder)


@pytest.fixture(scope="module")
def trained(folder: Path) -> list[tuple[list[tuple], list[tuple]]]:
    """For each rank: the results of `train` and of `train_with_hooks`."""
    return run_ranks(train_all, 2, folder=folder)


def train(rank: int, world: int, folder: Path) -> list[tuple]:
    from vime.backends.megatron.trainer import MegatronTrainer

    results = []
    turns = [(p, a) for p in LAYOUTS for a in CASES.values()]
    for number, (parallel, algorithm) in enumerate(turns):
        own_port = agree_on_port(folder, f"turn {number}", rank)
        cfg = config(folder, parallel, algorithm)
        trainer = MegatronTrainer(cfg, rank, world, rank, "127.0.0.1", own_port)
        metrics = trainer.train(build_train_batch(groups_of(folder), cfg, 0))
        results.append((metrics, named_gradients(trainer.actor)))
        trainer.close()
    return results


def test_the_ratio_of_a_sequence_is_the_same_in_every_layout(folder: Path, trained: list) -> None:
    turns = [(p, name) for p in LAYOUTS for name in CASES]
    wanted = {name: by_autograd(folder, a) for name, a in CASES.items()}
    for rank, _ in trained:
        for (parallel, name), (metrics, gradients) in zip(turns, rank, strict=True):
            loss, expected = wanted[name]
            assert metrics["train/loss"] == pytest.approx(loss, rel=1e-6, abs=1e-8), (
                parallel,
                name,
            )
            for n, gradient in expected.items():
                apart = float((gradients[n] - gradient).abs().max() / gradient.abs().max())
                assert apart < 1e-5, (parallel, name, n)
            assert metrics["train/train_rollout_logprob_abs_diff"] == pytest.approx(0.05, abs=0.03)
            if name == "weighed":
                assert 0 < metrics["train/tis_clipfrac"] < 1
                assert metrics["train/mismatch_k3_kl"] > 0
            else:
                assert 0 < metrics["train/opsm_clipfrac"] < 1
                assert 0 < metrics["train/pg_clipfrac"] < 1


def loss(args: Any, logp_T: Any, *, old_logp_T: Any, adv_T: Any, **known: Any) -> Any:
    ratio_T = (logp_T - old_logp_T).exp()
    mean_T = known["sequence_sum"](ratio_T) / known["sequence_sum"](torch.ones_like(ratio_T))
    return -ratio_T * adv_T, {"mean_ratio": mean_T}


def advantage(args: Any, sequences: Any, old_logp: Any, ref_logp: Any) -> list:
    assert all(float(x.max()) < 0 for x in old_logp)  # the whole response on any rank
    return [torch.full((s.response_length,), s.reward) for s in sequences]


def train_with_hooks(rank: int, world: int, folder: Path) -> list[tuple]:
    """A plain run on two ranks, then the same with users' functions that must not change it."""
    from vime.backends.megatron.trainer import MegatronTrainer

    hooks = {
        "custom_loss_path": f"{__name__}.loss",
        "custom_advantage_path": f"{__name__}.advantage",
    }
    results = []
    turns = (({}, {}), ({"cp": 2}, hooks), ({"pp": 2}, hooks))
    for number, (parallel, own) in enumerate(turns):
        own_port = agree_on_port(folder, f"turn {number} with hooks", rank)
        cfg = config(folder, parallel, own)
        trainer = MegatronTrainer(cfg, rank, world, rank, "127.0.0.1", own_port)
        metrics = trainer.train(build_train_batch(groups_of(folder), cfg, 0))
        results.append((metrics, named_gradients(trainer.actor)))
        trainer.close()
    return results


def test_users_functions_see_whole_sequences_in_every_layout(trained: list) -> None:
    for _, ((_, wanted), *others) in trained:
        assert wanted
        assert len(others) == 2
        for metrics, gradients in others:
            assert metrics["train/mean_ratio"] == pytest.approx(1.0, abs=1e-5)
            for name, gradient in wanted.items():
                apart = float((gradients[name] - gradient).abs().max() / gradient.abs().max())
                assert apart < 1e-4, name

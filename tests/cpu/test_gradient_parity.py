"""Two steps of GRPO in every layout against Hugging Face autograd: one loss, one gradient.

The second step is off-policy (ratios are not 1), has a reference that differs from the actor, an
entropy bonus, a temperature, a removed sample and a partial loss mask.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import free_port, run_ranks
from tiny import make_config, write_tiny_hf
from training import (
    hf_logps,
    hf_model,
    hf_policy_loss,
    named_gradients,
    named_weights,
    samples_of,
)

from vime.data.batching import build_train_batch

TEMPERATURE, LR, BETAS, EPS, DECAY = 0.7, 1e-2, (0.9, 0.98), 1e-2, 0.1
ALGORITHM = {
    "use_kl_loss": True,
    "kl_loss_coef": 0.1,
    "kl_loss_type": "k3",
    "entropy_coef": 0.2,
    "clip_low": 0.01,
    "clip_high_asked": 0.02,
}
PACKED = {"dynamic": True, "max_tokens_per_gpu": 60}
BALANCED = PACKED | {"balance": True, "log_probs_max_tokens_per_gpu": 100}
ONE_BY_ONE = {"micro_batch_size": 1}
TP2 = {"tp": 2, "sequence_parallel": True}
SHARDED = {"use_distributed_optimizer": True}
RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
MEMORY = {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "mlp_act"]}
Case = tuple[dict[str, Any], dict[str, Any]]
LAYOUTS: dict[int, list[Case]] = {
    1: [({}, PACKED), ({}, ONE_BY_ONE), ({}, {"dynamic": True, "max_tokens_per_gpu": 9216})],
    2: [
        ({}, BALANCED),
        ({}, {"micro_batch_size": 2}),
        (SHARDED, PACKED),
        (SHARDED | {"overlap_grad_reduce": True, "overlap_param_gather": True}, PACKED),
        (TP2, PACKED),
        (TP2 | RECOMPUTE, ONE_BY_ONE),
        (TP2 | MEMORY, PACKED),
        ({"pp": 2}, BALANCED),
        ({"pp": 2, "vpp": 2}, PACKED),
        ({"cp": 2}, PACKED),
        ({"cp": 2}, ONE_BY_ONE),
    ],
    4: [(TP2 | {"cp": 2}, PACKED)],
}


def config(folder: Path, world: int, case: Case) -> Any:
    parallel, batch = case
    return make_config(
        folder / "actor",
        model={"hf_checkpoint": str(folder / "actor"), "dtype": "float32"},
        cluster={"actor_gpus_per_node": world},
        parallel=parallel,
        batch={"prompts": 4, "samples_per_prompt": 4, "steps_asked": 2, "num_rollout": 1} | batch,
        rollout={"temperature": TEMPERATURE},
        algorithm=ALGORITHM,
        checkpoint={"ref_load": str(folder / "reference"), "load": str(folder / "actor")},
        optimizer={
            "lr": LR,
            "beta1": BETAS[0],
            "beta2": BETAS[1],
            "eps": EPS,
            "weight_decay": DECAY,
            "clip_grad": 0.0,
        },
    )


def groups_of(folder: Path) -> list:
    groups = samples_of(4, 4)
    groups[0][1].remove_sample = True
    groups[2][3].loss_mask = [i % 2 for i in range(groups[2][3].response_length)]
    for sample, logp in zip(sum(groups, []), torch.load(folder / "sampled.pt"), strict=True):
        sample.rollout_log_probs = logp
    return groups


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Actor, a reference that differs a little, and log-probabilities as an engine would give."""
    return write_models(tmp_path_factory.mktemp("parity"))


def write_models(root: Path, **shape: int) -> Path:
    write_tiny_hf(root / "actor", tied=True, **shape)
    reference = hf_model(root / "actor")
    reference.save_pretrained(root / "actor")
    torch.manual_seed(5)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.01 * torch.randn_like(p))
    reference.save_pretrained(root / "reference")
    actor = hf_model(root / "actor")
    with torch.no_grad():
        sampled = [hf_logps(actor, s, TEMPERATURE)[0].tolist() for g in samples_of(4, 4) for s in g]
    torch.save(sampled, root / "sampled.pt")
    return root


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Any]:
    """Loss per step, the second step's gradient and the weights after it, by plain autograd."""
    batch = build_train_batch(groups_of(folder), config(folder, 1, ({}, PACKED)), 0)
    # in float64, so that only the trainer's own rounding is measured
    model, reference = (hf_model(folder / n).double() for n in ("actor", "reference"))
    with torch.no_grad():
        old = [hf_logps(model, s, TEMPERATURE)[0] for s in batch.sequences]
        ref = [hf_logps(reference, s, TEMPERATURE)[0] for s in batch.sequences]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": norms, "weight_decay": 0.0}],
        lr=LR,
        betas=BETAS,
        eps=EPS,
    )
    losses = []
    for plan in batch.steps:
        members = sorted(p for b in plan.micro_batches[0] for p in b)
        optimizer.zero_grad()
        loss = hf_policy_loss(
            model,
            [batch.sequences[p] for p in members],
            [old[p] for p in members],
            [ref[p] for p in members],
            temperature=TEMPERATURE,
            clip=(ALGORITHM["clip_low"], ALGORITHM["clip_high_asked"]),
            kl_coef=ALGORITHM["kl_loss_coef"],
            entropy_coef=ALGORITHM["entropy_coef"],
        )
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    named = [(n, p) for n, p in model.named_parameters() if n != "lm_head.weight"]
    return {
        "loss": sum(losses) / len(losses),
        "gradients": {n: p.grad for n, p in named},
        "weights": {n: p.detach() for n, p in named},
    }


def train(
    rank: int, world: int, port: int, folder: Path, cases: list[Case], ports: list[int]
) -> list[dict]:
    from vime.backends.megatron.trainer import MegatronTrainer

    results = []
    for case, own_port in zip(cases, ports, strict=True):
        cfg = config(folder, world, case)
        trainer = MegatronTrainer(cfg, rank, world, rank, "127.0.0.1", own_port)
        metrics = trainer.train(build_train_batch(groups_of(folder), cfg, 0))
        is_sharded = case[0].get("use_distributed_optimizer")
        results.append(
            {
                "metrics": metrics,
                "gradients": None if is_sharded else on_cpu(named_gradients(trainer)),
                "weights": on_cpu(named_weights(trainer)),
            }
        )
        trainer.close()
    return results


def on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def worst(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert found.keys() == wanted.keys()
    return max(float((found[n] - wanted[n]).abs().max() / wanted[n].abs().max()) for n in wanted)


@pytest.mark.parametrize("world", LAYOUTS)
def test_loss_gradient_and_weights_are_those_of_plain_autograd(
    world: int, folder: Path, expected: dict[str, Any]
) -> None:
    cases = LAYOUTS[world]
    ports = [free_port() for _ in cases]
    ranks = run_ranks(train, world, folder=folder, cases=cases, ports=ports)
    for number, case in enumerate(cases):
        for rank in ranks:
            found = rank[number]
            m = found["metrics"]
            assert m["train/loss"] == pytest.approx(expected["loss"], rel=1e-6), case
            if found["gradients"] is not None:
                assert worst(found["gradients"], expected["gradients"]) < 1e-5, case
            assert worst(found["weights"], expected["weights"]) < 1e-5, case
            assert m["train/ppo_kl_first_step"] == 0.0, case
            assert 0 < m["train/pg_clipfrac"] < 1, case
            assert m["train/train_rollout_logprob_abs_diff_max"] < 2e-5, case
            same = {k: v for k, v in m.items() if not k.startswith("perf/")}
            other = {k: v for k, v in ranks[0][0]["metrics"].items() if k in same}
            assert same == pytest.approx(other, rel=1e-4, abs=1e-5), case


def train_on_one_sequence(
    rank: int, world: int, port: int, folder: Path, ports: list[int]
) -> list[dict]:
    """Shared by two context-parallel ranks, then on one of two data-parallel ranks."""
    from vime.backends.megatron.trainer import MegatronTrainer

    results = []
    for parallel, own_port in zip(({"cp": 2}, {}), ports, strict=True):
        one = {"prompts": 1, "samples_per_prompt": 1, "steps_asked": 1}
        cfg = config(folder, world, (parallel, PACKED | one))
        trainer = MegatronTrainer(cfg, rank, world, rank, "127.0.0.1", own_port)
        batch = build_train_batch([groups_of(folder)[0][:1]], cfg, 0)
        metrics = trainer.train(batch)
        gradients = named_gradients(trainer)
        results.append({"plan": batch.steps[0], "metrics": metrics, "gradients": gradients})
        trainer.close()
    return results


def test_a_rank_without_a_sequence_changes_nothing(folder: Path) -> None:
    ports = [free_port(), free_port()]
    for shared, alone in run_ranks(train_on_one_sequence, 2, folder=folder, ports=ports):
        assert alone["plan"].micro_batches == (((0,),), ((),))
        assert alone["metrics"]["train/loss"] == pytest.approx(
            shared["metrics"]["train/loss"], rel=1e-6
        )
        assert worst(alone["gradients"], shared["gradients"]) < 1e-5

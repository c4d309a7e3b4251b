"""Two steps of GRPO in every layout and batching, to compare with Hugging Face autograd in float64.

The second step is off-policy: ratios are not 1. The reference differs from the actor, and there are
an entropy bonus, a temperature, a removed sample and a partial loss mask. `benchmarks/parity.py`
writes the results into the table of docs/algorithms.md; `test_gradient_parity.py` asserts bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ranks import agree_on_port, run_ranks
from safetensors.torch import load_file
from tiny import make_config, write_tiny_hf
from torch import Tensor
from training import (
    hf_logps,
    hf_model,
    hf_policy_loss,
    named_gradients,
    named_weights,
    samples_of,
)

from vime.data.batching import build_train_batch

MAX_LOSS, MAX_GRADIENT = 1e-6, 1e-5
TEMPERATURE, LR, BETAS, EPS, DECAY = 0.7, 1e-2, (0.9, 0.98), 1e-2, 0.1
ALGORITHM = {
    "use_kl_loss": True,
    "kl_loss_coef": 0.1,
    "kl_loss_type": "k3",
    "entropy_coef": 0.2,
    "clip_low": 0.01,
    "clip_high_asked": 0.02,
}
DENSE, EXPERTS = "dense", "experts"
TAUGHT, SERVED = "with a teacher", "with a served teacher"
BY_TEACHER = (TAUGHT, SERVED)
MODELS: dict[str, dict[str, Any]] = {
    DENSE: {"tied": True},
    EXPERTS: {"moe": True, "num_hidden_layers": 2, "mlp_only_layers": [0]},
    TAUGHT: {"num_hidden_layers": 2},
    SERVED: {"num_hidden_layers": 2},
}
PACKED = {"dynamic": True, "max_tokens_per_gpu": 60}
BALANCED = PACKED | {"balance": True, "log_probs_max_tokens_per_gpu": 100}
TIGHT = {"dynamic": True, "max_tokens_per_gpu": 24}  # shorter than the longest sequences
WIDE = {"dynamic": True, "max_tokens_per_gpu": 9216}
ALONE = PACKED | {"prompts": 1, "samples_per_prompt": 1, "steps_asked": 1}
ONE_BY_ONE, BY_TWO = {"micro_batch_size": 1}, {"micro_batch_size": 2}
SP = {"sequence_parallel": True}
SHARDED = {"use_distributed_optimizer": True}
RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
MEMORY = {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "mlp_act"]}


@dataclass(frozen=True, slots=True)
class Case:
    """A layout and a batching of the same work; `parallel`, `batch`: fields of config sections."""

    name: str
    batching: str
    parallel: dict[str, Any]
    batch: dict[str, Any]
    model: str = DENSE

    @property
    def task(self) -> tuple[str, bool]:
        """(model, whether there is one sequence only). Cases with one task have equal results."""
        return self.model, self.batch == ALONE


# {number of ranks: cases}. Ranks that TP, PP and CP do not use are data parallel.
CASES: dict[int, list[Case]] = {
    1: [
        Case("one rank", "packs of 60", {}, PACKED),
        Case("one rank", "packs of 24, longer alone", {}, TIGHT),
        Case("one rank", "one pack", {}, WIDE),
        Case("one rank", "one by one", {}, ONE_BY_ONE),
        Case("one rank", "packs of 60, log-probs by 7", {}, PACKED | {"log_probs_chunk_asked": 7}),
        Case("one rank, recompute", "packs of 60", RECOMPUTE, PACKED),
        Case("one rank", "packs of 60", {}, PACKED, EXPERTS),
        Case("one rank", "packs of 60", {}, PACKED, TAUGHT),
    ],
    2: [
        Case("DP2", "packs of 60, balanced", {}, BALANCED),
        Case("DP2", "by two", {}, BY_TWO),
        Case("DP2, sharded optimizer", "packs of 60", SHARDED, PACKED),
        Case(
            "DP2, sharded optimizer, overlap",
            "packs of 60",
            SHARDED | {"overlap_grad_reduce": True, "overlap_param_gather": True},
            PACKED,
        ),
        Case("TP2", "packs of 60", {"tp": 2}, PACKED),
        Case("TP2+SP", "packs of 60", {"tp": 2} | SP, PACKED),
        Case("TP2+SP, recompute", "one by one", {"tp": 2} | SP | RECOMPUTE, ONE_BY_ONE),
        Case("TP2+SP, recompute norms", "packs of 60", {"tp": 2} | SP | MEMORY, PACKED),
        Case("PP2", "packs of 60, balanced", {"pp": 2}, BALANCED),
        Case("PP2, VPP2", "packs of 60", {"pp": 2, "vpp": 2}, PACKED),
        Case("PP2 of 3+1 layers", "packs of 60", {"pp": 2, "first_stage_layers": 3}, PACKED),
        Case("CP2", "packs of 60", {"cp": 2}, PACKED),
        Case("CP2", "one by one", {"cp": 2}, ONE_BY_ONE),
        Case("CP2", "one sequence in all", {"cp": 2}, ALONE),
        Case("DP2", "one sequence in all: a rank has none", {}, ALONE),
        Case("DP2, EP2", "packs of 60", {"ep": 2}, PACKED, EXPERTS),
        Case("TP2+SP, EP2", "packs of 60", {"tp": 2, "ep": 2} | SP, PACKED, EXPERTS),
        Case("TP2+SP", "packs of 60", {"tp": 2} | SP, PACKED, TAUGHT),
        Case("PP2", "packs of 60, balanced", {"pp": 2}, BALANCED, TAUGHT),
        Case("CP2", "packs of 60", {"cp": 2}, PACKED, TAUGHT),
        Case("PP2", "packs of 60, balanced", {"pp": 2}, BALANCED, SERVED),
        Case("CP2", "packs of 60", {"cp": 2}, PACKED, SERVED),
    ],
    4: [
        Case("DP4", "packs of 60, balanced", {}, BALANCED),
        Case("DP4", "by two", {}, BY_TWO),
        Case("DP2, PP2", "packs of 60", {"pp": 2}, PACKED),
        Case("TP2+SP, CP2", "packs of 60", {"tp": 2, "cp": 2} | SP, PACKED),
        Case("DP4, EP2", "packs of 60, balanced", {"ep": 2}, BALANCED, EXPERTS),
        Case("CP2, DP2, EP2", "packs of 60", {"cp": 2, "ep": 2}, PACKED, EXPERTS),
    ],
}


@dataclass(frozen=True, slots=True)
class Expected:
    """Results of plain autograd in float64, so that only the trainer's rounding is measured.

    loss       mean over the steps
    gradients  of the last step, {HF name: tensor}
    weights    after the last step
    """

    loss: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Apart:
    """Relative differences of one rank's results from the expected ones."""

    loss: float
    gradient: float | None  # None: the optimizer shards gradients, so only weights can be compared
    weights: float


def config(root: Path, world: int, case: Case) -> Any:
    folder = root / case.model
    return make_config(
        folder / "actor",
        model={"hf_checkpoint": str(folder / "actor"), "dtype": "float32"},
        cluster={"actor_gpus_per_node": world},
        parallel=case.parallel,
        batch={"prompts": 4, "samples_per_prompt": 4, "steps_asked": 2, "num_rollout": 1}
        | case.batch,
        rollout={"temperature": TEMPERATURE},
        algorithm=ALGORITHM
        | {
            "use_opd": case.model in BY_TEACHER,
            "opd_type": "vllm" if case.model == SERVED else "megatron",
        },
        checkpoint={
            "ref_load": str(folder / "reference"),
            "load": str(folder / "actor"),
            "opd_teacher_load": str(folder / "teacher") if case.model == TAUGHT else None,
        },
        optimizer={
            "lr": LR,
            "beta1": BETAS[0],
            "beta2": BETAS[1],
            "eps": EPS,
            "weight_decay": DECAY,
            "clip_grad": 0.0,
        },
    )


def groups_of(root: Path, model: str, alone: bool) -> list:
    groups = samples_of(4, 4)
    groups[0][1].remove_sample = True
    groups[2][3].loss_mask = [i % 2 for i in range(groups[2][3].response_length)]
    sampled, taught = (torch.load(root / model / f"{n}.pt") for n in ("sampled", "taught"))
    for sample, logp, teachers in zip(sum(groups, []), sampled, taught, strict=True):
        sample.rollout_log_probs, sample.teacher_log_probs = logp, teachers
    return [groups[0][:1]] if alone else groups


def write_models(root: Path, **shape: int) -> None:
    """Writes actors, references and teachers that differ a little, and log-probabilities."""
    for model, own_shape in MODELS.items():
        folder = root / model
        write_tiny_hf(folder / "actor", **own_shape, **shape)
        actor, other = hf_model(folder / "actor"), hf_model(folder / "actor")
        torch.manual_seed(5)
        with torch.no_grad():
            for name in ("reference", "teacher"):
                for p in other.parameters():
                    p.add_(0.01 * torch.randn_like(p))
                other.save_pretrained(folder / name)
            samples = sum(samples_of(4, 4), [])
            for name, its in (("sampled", actor), ("taught", other)):
                logps = [hf_logps(its, s, TEMPERATURE)[0].tolist() for s in samples]
                torch.save(logps, folder / f"{name}.pt")


def all_expected(root: Path) -> dict[tuple[str, bool], Expected]:
    """{`Case.task`: its expected results}"""
    tasks = {case.task for cases in CASES.values() for case in cases}
    return {task: expected_of(root, *task) for task in sorted(tasks)}


def expected_of(root: Path, model: str, alone: bool = False) -> Expected:
    """The steps in plain PyTorch: one process, one sequence at a time, AdamW."""
    plan = Case("", "", {}, ALONE if alone else PACKED, model)
    batch = build_train_batch(groups_of(root, model, alone), config(root, 1, plan), 0)
    actor, reference = (hf_model(root / model / n).double() for n in ("actor", "reference"))
    if model == EXPERTS:
        for m in (actor, reference):
            m.set_experts_implementation("eager")  # the others refuse float64
    with torch.no_grad():
        old = [hf_logps(actor, s, TEMPERATURE)[0] for s in batch.sequences]
        ref = [hf_logps(reference, s, TEMPERATURE)[0] for s in batch.sequences]
        teacher = None
        if model in BY_TEACHER:
            judge = hf_model(root / model / "teacher").double()
            teacher = [hf_logps(judge, s, TEMPERATURE)[0] for s in batch.sequences]
    matrices = [p for p in actor.parameters() if p.ndim > 1]
    norms = [p for p in actor.parameters() if p.ndim == 1]
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
            actor,
            [batch.sequences[p] for p in members],
            [old[p] for p in members],
            [ref[p] for p in members],
            temperature=TEMPERATURE,
            clip=(ALGORITHM["clip_low"], ALGORITHM["clip_high_asked"]),
            kl_coef=ALGORITHM["kl_loss_coef"],
            entropy_coef=ALGORITHM["entropy_coef"],
            teacher=teacher and [teacher[p] for p in members],
        )
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    weights = _by_file_name(actor, root / model / "weights")
    with torch.no_grad():
        for p in actor.parameters():
            p.copy_(p.grad)
    gradients = _by_file_name(actor, root / model / "gradients")
    return Expected(sum(losses) / len(losses), gradients, weights)


def _by_file_name(model: Any, folder: Path) -> dict[str, Tensor]:
    """Parameters by their names in HF files, which differ from the module's names for experts."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def train(rank: int, world: int, port: int, root: Path, cases: list[Case]) -> list[dict]:
    """This rank's results, one for each case. For `run_ranks`; call it once per cases and root."""
    from vime.backends.megatron.trainer import MegatronTrainer

    results = []
    for case in cases:
        print(case, flush=True)
        own_port = agree_on_port(root, f"{world}, {case.model}, {case.name}, {case.batching}", rank)
        cfg = config(root, world, case)
        trainer = MegatronTrainer(cfg, rank, world, rank, "127.0.0.1", own_port)
        metrics = trainer.train(build_train_batch(groups_of(root, *case.task), cfg, 0))
        is_sharded = case.parallel.get("use_distributed_optimizer")
        results.append(
            {
                "metrics": metrics,
                "gradients": None if is_sharded else on_cpu(named_gradients(trainer.actor)),
                "weights": on_cpu(named_weights(trainer.actor)),
            }
        )
        trainer.close()
    return results


def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def run(root: Path, world: int, timeout_s: float = 400.0) -> list[list[dict]]:
    """The results of every rank, [rank][number of the case]."""
    return run_ranks(train, world, root=root, cases=CASES[world], timeout_s=timeout_s)


def apart(found: dict, expected: Expected) -> Apart:
    return Apart(
        abs(found["metrics"]["train/loss"] - expected.loss) / abs(expected.loss),
        None if found["gradients"] is None else worst(found["gradients"], expected.gradients),
        worst(found["weights"], expected.weights),
    )


def largest(found: Sequence[Apart]) -> Apart:
    """The largest differences of several ranks."""
    gradients = [a.gradient for a in found if a.gradient is not None]
    return Apart(
        max(a.loss for a in found),
        max(gradients) if gradients else None,
        max(a.weights for a in found),
    )


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference of any tensor, relative to the tensor's largest value."""
    assert found.keys() == wanted.keys()
    return max(
        float((found[n] - wanted[n]).abs().max() / wanted[n].abs().max().clamp(min=1e-12))
        for n in wanted
    )

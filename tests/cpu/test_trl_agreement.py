"""vime's losses on random inputs, compared with those of TRL's GRPOTrainer.

Both get the same log-probabilities, advantages and masks, padded for TRL and flat for vime. Ratios
exceed every bound, masks have gaps, and one sequence has no loss token.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cpu.tiny import make_config
from vime.backends.megatron.training.losses import objective_of
from vime.data.batching import build_train_batch
from vime.types import Sample, Status

LONGEST, SEQUENCES = 12, 8
CLIP = {"clip_low": 0.2, "clip_high_asked": 0.28}
KL = {"use_kl_loss": True, "kl_loss_coef": 0.05, "kl_loss_type": "k3"}
TIS = {"use_tis": True, "tis_clip": 1.5, "tis_clip_low": 0.5}

# {name: (flags of vime, attributes of TRL's trainer, attributes of the trainer's args)}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "grpo": (CLIP | KL, {"loss_type": "grpo", "beta": 0.05}, {}),
    "grpo, dual clip": (CLIP | {"dual_clip": 2.0}, {"loss_type": "grpo"}, {"delta": 2.0}),
    "grpo, unbiased KL": (
        CLIP | KL | {"unbiased_kl": True},
        {"loss_type": "grpo", "beta": 0.05},
        {"use_bias_correction_kl": True},
    ),
    "dr_grpo": (
        CLIP | KL | {"advantage_estimator": "dr_grpo"},
        {"loss_type": "dr_grpo", "beta": 0.05},
        {},
    ),
    "bnpo, entropy bonus": (
        CLIP | {"per_token_loss": True, "entropy_coef": 0.1},
        {"loss_type": "bnpo", "_entropy_bonus_enabled": True, "entropy_coef": 0.1},
        {},
    ),
    "dapo": (CLIP | KL | {"per_token_loss": True}, {"loss_type": "dapo", "beta": 0.05}, {}),
    "gspo": (
        {"advantage_estimator": "gspo", "clip_low": 0.03, "clip_high_asked": 0.04},
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon_low": 0.03,
            "epsilon_high": 0.04,
        },
        {},
    ),
    "cispo": (  # TRL bounds the ratio itself, vime its distance from 1
        {"advantage_estimator": "cispo", "clip_low": 1.0, "clip_high_asked": 0.5}
        | {"per_token_loss": True},
        {"loss_type": "cispo", "epsilon_high": 1.5},
        {},
    ),
    "opsm": (
        CLIP | {"use_opsm": True, "opsm_delta": 0.02},
        {"loss_type": "grpo", "off_policy_mask_threshold": 0.02},
        {},
    ),
    "truncated importance sampling": (
        CLIP | KL | TIS,
        {"loss_type": "grpo", "beta": 0.05, "use_vllm": True},
        {},
    ),
    "masked importance sampling": (
        CLIP | TIS | {"tis_mode": "mask"},
        {"loss_type": "grpo", "use_vllm": True},
        {},
    ),
}


@dataclass
class Padded:
    """Random inputs [S, T]; the tokens of a sequence are on the left."""

    seed: int
    logp: Tensor = field(init=False)
    old: Tensor = field(init=False)
    ref: Tensor = field(init=False)
    engine: Tensor = field(init=False)
    entropy: Tensor = field(init=False)
    adv: Tensor = field(init=False)
    present: Tensor = field(init=False)  # 1 at the tokens of a response
    mask: Tensor = field(init=False)  # 1 at the tokens with loss

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        shape = (SEQUENCES, LONGEST)

        def normal(std: float) -> Tensor:
            return std * torch.randn(shape, generator=g, dtype=torch.float64)

        self.old = -normal(1.0).abs() - 0.1
        self.logp, self.ref, self.engine = (self.old + normal(s) for s in (0.4, 0.3, 0.4))
        self.entropy = normal(1.0).abs()
        self.adv = normal(1.0)[:, 0].float().double()
        lengths = torch.randint(2, LONGEST + 1, (SEQUENCES, 1), generator=g)
        self.present = (torch.arange(LONGEST) < lengths).double()
        self.mask = self.present * (torch.rand(shape, generator=g) < 0.7)
        self.mask[:, 0] = 1.0
        self.mask[3] = 0.0


def trl_loss(data: Padded, own: dict[str, Any], args: dict[str, Any], weights: Tensor) -> Tensor:
    """The result of `GRPOTrainer._compute_loss`, on a trainer with only the attributes it reads."""
    with mock.patch("trl.import_utils.is_vllm_available", return_value=False):
        from trl.trainer.grpo_trainer import GRPOTrainer  # vLLM would take seconds to import
    trainer = object.__new__(GRPOTrainer)
    trainer.args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    vars(trainer.args).update(args)
    trainer.accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
    )
    trainer.model = SimpleNamespace(training=True)
    trainer._metrics = {"train": defaultdict(list)}
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (data.logp, data.entropy, None)
    defaults = {
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "importance_sampling_level": "token",
        "off_policy_mask_threshold": None,
        "beta": 0.0,
        "use_vllm": False,
        "vllm_importance_sampling_correction": True,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": LONGEST,
        "top_entropy_quantile": 1.0,
        "_entropy_bonus_enabled": False,
        "use_adaptive_entropy": False,
        "aux_loss_enabled": False,
    }
    for name, value in (defaults | own).items():
        setattr(trainer, name, value)
    ids = torch.zeros(SEQUENCES, LONGEST, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids,
        "completion_mask": data.present,
        "tool_mask": data.mask,
        "advantages": data.adv,
        "old_per_token_logps": data.old,
        "ref_per_token_logps": data.ref,
        "importance_sampling_ratio": weights,
        "num_items_in_batch": data.mask.sum(),
    }
    return trainer._compute_loss(trainer.model, inputs)


def engine_weights(data: Padded, is_masked: bool) -> Tensor:
    """TRL computes them during generation: token_truncate or token_mask of old / engine."""
    ratio = ((data.old - data.engine) * data.mask).exp()
    if is_masked:
        return ratio.masked_fill((ratio < TIS["tis_clip_low"]) | (ratio > TIS["tis_clip"]), 0.0)
    return ratio.clamp(TIS["tis_clip_low"], TIS["tis_clip"])


def vime_loss(data: Padded, algorithm: dict[str, Any]) -> Tensor:
    """The sum over the tokens with loss of the batch's weight times the objective."""
    cfg = make_config(
        "unused",
        batch={"prompts": SEQUENCES, "samples_per_prompt": 1, "micro_batch_size": SEQUENCES},
        rollout={"max_response_len": LONGEST},
        algorithm=algorithm,
    )
    lengths = data.present.sum(1).int().tolist()
    samples = [
        Sample(
            index=i,
            tokens=[0] * (1 + size),
            response_length=size,
            reward=0.0,
            loss_mask=data.mask[i, :size].int().tolist(),
            rollout_log_probs=data.engine[i, :size].tolist(),
            status=Status.COMPLETED,
        )
        for i, size in enumerate(lengths)
    ]
    scores = data.adv.tolist()
    batch = build_train_batch([samples], cfg, 0, post_process=lambda found: (scores, scores))
    assert [s.reward for s in batch.sequences] == scores
    rows, columns = data.mask.nonzero(as_tuple=True)
    weights = np.concatenate([s.weight[s.loss_mask > 0] for s in batch.sequences])

    def sequence_sum(values_T: Tensor) -> Tensor:
        values_T = values_T.detach()
        return values_T.new_zeros(SEQUENCES).index_add(0, rows, values_T)[rows]

    objective = objective_of(cfg)
    made = objective(
        data.logp[rows, columns],
        old_logp_T=data.old[rows, columns],
        adv_T=data.adv[rows],
        entropy_T=data.entropy[rows, columns],
        ref_logp_T=data.ref[rows, columns] if cfg.algorithm.use_kl_loss else None,
        rollout_logp_T=data.engine[rows, columns],
        sequence_sum=sequence_sum,
    )
    return (torch.as_tensor(weights) * made.value_T).sum()


def with_gradients(loss: Tensor, data: Padded) -> tuple[float, Tensor, Tensor]:
    grads = torch.autograd.grad(
        loss, (data.logp, data.entropy), allow_unused=True, materialize_grads=True
    )
    return loss.item(), *grads


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_equal_trl(name: str) -> None:
    pytest.importorskip("trl", reason="needs TRL, a peer to compare with")
    algorithm, own, args = CASES[name]
    for seed in range(5):
        data = Padded(seed)
        data.logp.requires_grad_()
        data.entropy.requires_grad_()
        weights = engine_weights(data, algorithm.get("tis_mode") == "mask")
        expected = with_gradients(trl_loss(data, own, args, weights), data)
        found = with_gradients(vime_loss(data, algorithm), data)
        assert found[0] == pytest.approx(expected[0], rel=1e-6, abs=1e-7)
        assert expected[1].abs().max() > 0.01
        for mine, theirs in zip(found[1:], expected[1:], strict=True):  # weights are float32
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)

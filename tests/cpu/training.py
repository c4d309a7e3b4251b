"""Rollouts made by hand, and the losses that a plain Hugging Face model gives them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vime.types import Sample, Status

VOCAB = 97


def samples_of(num_groups: int, per_group: int, seed: int = 0) -> list[list[Sample]]:
    """Groups with prompts of 3 to 9 tokens and responses of 2 to 30, rewards 0 or 1."""
    rng = np.random.default_rng(seed)
    groups = []
    for g in range(num_groups):
        prompt = rng.integers(0, VOCAB, int(rng.integers(3, 10))).tolist()
        group = []
        for i in range(per_group):
            response = rng.integers(0, VOCAB, int(rng.integers(2, 31))).tolist()
            group.append(
                Sample(
                    group_index=g,
                    index=g * per_group + i,
                    tokens=prompt + response,
                    response_length=len(response),
                    reward=float(i % 2),
                    status=Status.COMPLETED,
                )
            )
        groups.append(group)
    return groups


def hf_model(folder: str | Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def hf_logps(model: Any, sequence: Any, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of one sequence's response tokens, [R] each."""
    tokens = torch.as_tensor(sequence.tokens).long()
    size = sequence.response_length
    logits = model(tokens[None]).logits[0, -size - 1 : -1] / temperature
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, tokens[-size:, None])[:, 0], entropy


def hf_policy_loss(
    model: Any,
    sequences: Sequence[Any],
    old: Sequence[Tensor],
    ref: Sequence[Tensor],
    *,
    temperature: float,
    clip: tuple[float, float],
    kl_coef: float,
    entropy_coef: float,
    teacher: Sequence[Tensor] | None = None,
) -> Tensor:
    """Clipped loss + KL (k3) - entropy, written out: the mean over sequences of token means.

    teacher  its log-probabilities, for on-policy distillation
    """
    loss = torch.zeros((), dtype=old[0].dtype)
    for i, (seq, old_logp, ref_logp) in enumerate(zip(sequences, old, ref, strict=True)):
        advantage = seq.reward - (0.0 if teacher is None else old_logp - teacher[i])
        logp, entropy = hf_logps(model, seq, temperature)
        ratio = (logp - old_logp).exp()
        free, held = ratio * advantage, ratio.clamp(1 - clip[0], 1 + clip[1]) * advantage
        kl = (ref_logp - logp).exp() - 1 - (ref_logp - logp)
        token = -torch.minimum(free, held) + kl_coef * kl - entropy_coef * entropy
        mask = torch.as_tensor(seq.loss_mask)
        loss = loss + (token * mask).sum() / mask.sum().clamp(min=1) / len(sequences)
    return loss


def named_gradients(model: Any) -> dict[str, Tensor]:
    """{HF name: gradient of the latest step before clipping}. The optimizer must not be sharded."""
    from vime.backends.megatron.weights.export import export_hf

    params = [p for chunk in model.chunks for p in chunk.parameters()]
    kept = [p.detach().clone() for p in params]
    for p in params:
        p.data.copy_(p.main_grad)
    gradients = {name: t.clone() for name, t in export_hf(model.chunks, model.cfg)}
    for p, before in zip(params, kept, strict=True):
        p.data.copy_(before)
    return gradients


def named_weights(model: Any) -> dict[str, Tensor]:
    from vime.backends.megatron.weights.export import export_hf

    return {name: t.clone() for name, t in export_hf(model.chunks, model.cfg)}

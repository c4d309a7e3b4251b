"""PPO's critic: a value model beside the actor, on the same ranks and in the same layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from vime.backends.megatron.checkpoints.load import load_critic
from vime.backends.megatron.checkpoints.start import Start
from vime.backends.megatron.chunks import unwrap
from vime.backends.megatron.model.build import build_model
from vime.backends.megatron.training.judges import remember_values, value_judge
from vime.backends.megatron.training.optimizer import (
    apply_flags_again,
    build_optimizer,
    wrap_for_training,
)
from vime.backends.megatron.training.passes import run_chunks
from vime.backends.megatron.training.rollout_columns import RolloutColumns
from vime.backends.megatron.training.totals import step_means
from vime.backends.megatron.training.update import Updates
from vime.config import Config
from vime.types import StepPlan


class Critic:
    """Model, optimizer and loss. It starts as a copy of the actor with a value head of zeros.

    All ranks build their critics together, and every method is a collective.

    start  a checkpoint; if the run resumes from it, the checkpoint may hold the critic too
    actor  the actor's chunks, already loaded
    """

    def __init__(self, cfg: Config, start: Start, actor: Sequence[nn.Module]) -> None:
        self.cfg = cfg = cfg.of_critic
        self.chunks = wrap_for_training(cfg, build_model(cfg, critic=True))
        _copy(actor, self.chunks)
        self.optimizer, self.scheduler = build_optimizer(cfg, self.chunks)
        load_critic(cfg, start, self)
        apply_flags_again(cfg, self.optimizer, self.scheduler)
        lr_flag = f"--critic-lr {cfg.optimizer.lr}"
        self.updates = Updates(self.chunks, self.optimizer, self.scheduler, lr_flag, "critic_")

    def values(self, columns: RolloutColumns, plans: Sequence[StepPlan]) -> Tensor:
        """A column: the value of the state before each token, under the current weights."""
        value_N = columns.table.column()
        batches = [b for plan in plans for b in columns.micro_batches(plan)]
        run_chunks(self.chunks, batches, remember_values(value_N), forward_only=True)
        return value_N

    def step(
        self, columns: RolloutColumns, plan: StepPlan, where: str, samples: Callable[[], str]
    ) -> dict[str, float]:
        """One optimizer step towards the columns' returns. Returns its metrics.

        `Updates.take` explains `where` and `samples`.
        """
        self.updates.begin()
        clip = self.cfg.algorithm.value_clip
        judge = value_judge(columns.table, columns.value_N, columns.return_N, clip=clip)
        batches = columns.micro_batches(plan)
        sums = run_chunks(self.chunks, batches, judge, forward_only=False)
        loss, means = step_means(sums, columns.table.weight_N.device)
        metrics = {"train/value_loss": loss, **means}
        return self.updates.take(loss, metrics, f"the critic in {where}", samples)


@torch.no_grad()
def _copy(source: Sequence[nn.Module], target: Sequence[nn.Module]) -> None:
    """Copies all weights and buffers except the head. Both models have the same layout."""
    for a, b in zip(source, target, strict=True):
        known = dict(_tensors(a))
        for name, tensor in _tensors(b):
            if not name.startswith("output_layer."):
                tensor.copy_(known[name])


def _tensors(chunk: nn.Module) -> Any:
    model = unwrap(chunk)
    return chain(model.named_parameters(), model.named_buffers())

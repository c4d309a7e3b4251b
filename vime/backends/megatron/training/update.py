"""Optimizer steps of one model. A step with a loss or gradient that is not finite is skipped."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from vime.backends.megatron.chunks import named_router_biases

MAX_SKIPPED_STEPS = 5  # in a row, before the run stops


class Updates:
    """
    lr_flag  the flag and value of the learning rate, for an error
    prefix   the prefix in the names of this model's metrics: "" or "critic_"
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        optimizer: Any,
        scheduler: Any,
        lr_flag: str,
        prefix: str = "",
    ) -> None:
        self.chunks = chunks
        self.optimizer, self.scheduler = optimizer, scheduler
        self.lr_flag, self.prefix = lr_flag, prefix
        self.biases = [bias for chunk in chunks for _, bias in named_router_biases(chunk)]
        self.biases_before: list[torch.Tensor] = []
        self.skipped_in_a_row = 0

    def begin(self) -> None:
        """Before the passes of a step: clears gradients.

        It also copies the routers' biases, because Megatron moves them at the end of the last pass.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.biases_before = [bias.clone() for bias in self.biases]

    def take(
        self, loss: float, metrics: dict[str, float], where: str, samples: Callable[[], str]
    ) -> dict[str, float]:
        """Takes the step or skips it. Returns its metrics; {} for a skipped step.

        metrics  figures of the passes, to which gradient norm and learning rate are added
        where    names rollout and step in the log and in the error
        samples  names the samples that are not finite; a collective, called for skipped steps only
        Raises RuntimeError after MAX_SKIPPED_STEPS skipped steps in a row.
        """
        overflow = self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if overflow or not (math.isfinite(loss) and math.isfinite(norm)):
            self._skip(f"{where} ({samples()}): loss {loss}, gradient norm {norm}")
            return {}
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.scheduler.step(1)
        self.skipped_in_a_row = 0
        return {
            **metrics,
            f"train/{self.prefix}grad_norm": norm,
            f"train/{self.prefix}lr": lr,
        }

    def _skip(self, problem: str) -> None:
        self.skipped_in_a_row += 1
        for bias, before in zip(self.biases, self.biases_before, strict=True):
            bias.copy_(before)
        logging.getLogger(__name__).warning("skipped the optimizer step of %s", problem)
        if self.skipped_in_a_row >= MAX_SKIPPED_STEPS:
            raise RuntimeError(
                f"{self.skipped_in_a_row} optimizer steps in a row were not finite, the last "
                f"at {problem}. Lower {self.lr_flag}, or continue from an older checkpoint "
                "with --ckpt-step."
            )

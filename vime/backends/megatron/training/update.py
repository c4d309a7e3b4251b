"""Optimizer steps of one model: taken, or skipped where something is not finite."""

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
    lr_flag  how an error names the learning rate: flag and value
    lr       of the latest step
    """

    def __init__(
        self, chunks: Sequence[nn.Module], optimizer: Any, scheduler: Any, lr_flag: str
    ) -> None:
        self.chunks = chunks
        self.optimizer, self.scheduler, self.lr_flag = optimizer, scheduler, lr_flag
        self.biases = [bias for chunk in chunks for _, bias in named_router_biases(chunk)]
        self.biases_before: list[torch.Tensor] = []
        self.skipped_in_a_row = 0
        self.lr = 0.0

    def begin(self) -> None:
        """Before the passes: no gradient yet. Megatron moves the routers' biases with the last."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.biases_before = [bias.clone() for bias in self.biases]

    def take(self, loss: float, where: str, samples: Callable[[], str]) -> float | None:
        """One step. Returns the gradient norm, or None where the step was skipped.

        where    names rollout and step in the log and in the error
        samples  says which samples are at fault; a collective, asked only when a step is skipped
        Raises RuntimeError when MAX_SKIPPED_STEPS in a row were not finite.
        """
        overflow = self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if overflow or not (math.isfinite(loss) and math.isfinite(norm)):
            self.skipped_in_a_row += 1
            for bias, before in zip(self.biases, self.biases_before, strict=True):
                bias.copy_(before)
            problem = f"{where} ({samples()}): loss {loss}, gradient norm {norm}"
            logging.getLogger(__name__).warning("skipped the optimizer step of %s", problem)
            if self.skipped_in_a_row >= MAX_SKIPPED_STEPS:
                raise RuntimeError(
                    f"{self.skipped_in_a_row} optimizer steps in a row were not finite, the last "
                    f"at {problem}. Lower {self.lr_flag}, or continue from an older checkpoint "
                    "with --ckpt-step."
                )
            return None
        self.lr = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.scheduler.step(1)
        self.skipped_in_a_row = 0
        return norm

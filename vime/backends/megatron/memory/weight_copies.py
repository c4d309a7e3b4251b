"""Further sets of weights for the same model, kept on the CPU and swapped in for forward passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vime.backends.megatron.chunks import named_router_biases


class WeightCopy:
    """A copy of the weights that this rank's chunks hold now.

    It includes the bias of a sigmoid router, which is a buffer but selects the experts.
    """

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        self.tensors = [t for chunk in chunks for t in _weights(chunk)]
        self.values = [_on_cpu(t) for t in self.tensors]

    @contextmanager
    @torch.no_grad()
    def swapped_in(self) -> Iterator[None]:
        """Puts the copy into the chunks, and their own weights back at the end, bit for bit.

        No parameter gather may be in progress: it would overwrite the copy.
        """
        before = [_on_cpu(t) for t in self.tensors]
        self._fill(self.values)
        try:
            yield
        finally:
            self._fill(before)

    @torch.no_grad()
    def _fill(self, values: Sequence[Tensor]) -> None:
        for t, value in zip(self.tensors, values, strict=True):
            t.data.copy_(value, non_blocking=True)
        if self.tensors and self.tensors[0].is_cuda:
            torch.cuda.current_stream().synchronize()


class SentWeights:
    """Copies of the weights sent to the engines, kept while rollouts from them may arrive.

    copies   {version: copy}
    current  the version that the chunks still hold; None after an optimizer step
    """

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        self.chunks = chunks
        self.copies: dict[int, WeightCopy] = {}
        self.current: int | None = None

    def are_current(self, version: int | None) -> bool:
        return version is not None and version == self.current

    def keep(self, version: int) -> None:
        self.copies[version] = WeightCopy(self.chunks)
        self.current = version

    def trained(self, version: int | None, *, moved: bool) -> None:
        """Drops copies older than `version`, because no later rollout comes from older weights.

        moved  an optimizer step has changed the chunks
        """
        if moved:
            self.current = None
        if version is not None:
            self.copies = {v: copy for v, copy in self.copies.items() if v >= version}


def _weights(chunk: nn.Module) -> Iterator[Tensor]:
    yield from chunk.parameters()
    yield from (bias for _, bias in named_router_biases(chunk))


def _on_cpu(t: Tensor) -> Tensor:
    """A copy in host memory, pinned when `t` is on a GPU."""
    held = torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=t.is_cuda)
    return held.copy_(t.detach())

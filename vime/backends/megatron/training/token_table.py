"""This rank's tokens as one flat table, and micro-batches as indices into it.

A row describes one prediction: its token is the last input, and the next token is the target. Each
quantity per token (weight, advantage, old log-probability ...) is a column. One gather lays out a
micro-batch, with any packing, padding or context parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from vime.backends.megatron.model.pack import make_pack
from vime.backends.megatron.model.zigzag import zigzag_order
from vime.types import TrainSequence


@dataclass(frozen=True, slots=True)
class TokenTable:
    """N rows: the sequences end to end, then one row of padding with weight 0.

    weight_N and mask_N are 0 at rows that predict no response token: inside prompts, at a
    sequence's last token, in the padding. Log-probabilities are NaN where unknown.
    """

    tokens_N: Tensor  # int64
    targets_N: Tensor  # int64
    weight_N: Tensor  # float32
    mask_N: Tensor  # float32, 0 or 1
    rollout_logp_N: Tensor  # float32
    teacher_logp_N: Tensor  # float32
    sequence_N: Tensor  # int64, number of the sequence in the table; num_sequences for padding
    starts: dict[int, int]  # position in the batch -> first row
    responses: dict[int, slice]  # position in the batch -> rows that predict its response

    @property
    def padding(self) -> int:
        """The padding row."""
        return len(self.tokens_N) - 1

    @property
    def num_sequences(self) -> int:
        return len(self.starts)

    def column(self) -> Tensor:
        """A new column of zeros."""
        return torch.zeros_like(self.weight_N)


def token_table(
    sequences: Sequence[TrainSequence], positions: Sequence[int], device: torch.device
) -> TokenTable:
    """The table of the sequences at `positions`, which belong to one data-parallel rank."""
    rows = sum(sequences[p].length for p in positions) + 1
    tokens, targets = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    weight, mask = (np.zeros(rows, np.float32) for _ in range(2))
    rollout_logp, teacher_logp = (np.full(rows, np.nan, np.float32) for _ in range(2))
    sequence = np.full(rows, len(positions), np.int64)
    starts, responses, first = {}, {}, 0
    for number, p in enumerate(positions):
        seq = sequences[p]
        last = first + seq.length
        tokens[first:last] = seq.tokens
        targets[first : last - 1] = seq.tokens[1:]
        response = slice(last - 1 - seq.response_length, last - 1)
        weight[response], mask[response] = seq.weight, seq.loss_mask
        if seq.rollout_logp is not None:
            rollout_logp[response] = seq.rollout_logp
        if seq.teacher_logp is not None:
            teacher_logp[response] = seq.teacher_logp
        sequence[first:last] = number
        starts[p], responses[p], first = first, response, last
    columns = (tokens, targets, weight, mask, rollout_logp, teacher_logp, sequence)
    return TokenTable(*(torch.from_numpy(c).to(device) for c in columns), starts, responses)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The input of one forward pass on this rank. With context parallelism: the rank's share."""

    rows_T: Tensor  # int64, into the table
    tokens: Tensor  # [1, T] int64
    positions: Tensor  # [1, T] int64, unused: rotary embeddings of packs count positions themselves
    padding: Tensor  # [1, T] bool
    pack: PackedSeqParams
    kept_T: Tensor  # int64, indices of tokens with weight; found early, because it waits for a GPU


def lay_out(
    table: TokenTable,
    positions: Sequence[int],
    lengths: Sequence[int],
    *,
    cp: int = 1,
    cp_rank: int = 0,
    tp_shards: int = 1,
) -> MicroBatch:
    """One micro-batch. Padding is always at the end of a sequence, so causal attention ignores it.

    positions  positions of its sequences in the batch; without any, the micro-batch is padding
    lengths    numbers of tokens of these sequences
    cp         each sequence is padded to a multiple of 2 * cp and cut into zigzag chunks
    tp_shards  number of ranks that share the tokens under sequence parallelism: a sequence of
               padding makes this rank's tokens a multiple of it
    """
    multiple = 2 * cp if cp > 1 else 1
    pieces, sizes = [], []
    for p, length in zip(positions, lengths, strict=True):
        start = table.starts[p]
        size = -(-length // multiple) * multiple
        rows = np.full(size, table.padding, np.int64)
        rows[:length] = np.arange(start, start + length)
        pieces.append(rows)
        sizes.append(size)
    whole = int(np.lcm(multiple, cp * tp_shards))
    missing = -sum(sizes) % whole if sizes else whole
    if missing:
        pieces.append(np.full(missing, table.padding, np.int64))
        sizes.append(missing)
    rows_T = torch.from_numpy(np.concatenate(pieces))
    bounds = [0, *np.cumsum(sizes).tolist()]
    if cp > 1:
        shards = torch.empty_like(rows_T)
        shards[zigzag_order(bounds, cp)] = rows_T
        rows_T = shards.chunk(cp)[cp_rank]
    device = table.tokens_N.device
    rows_T = rows_T.to(device)
    tokens = table.tokens_N[rows_T][None]
    padding = (rows_T == table.padding)[None]
    kept_T = table.weight_N[rows_T].nonzero()[:, 0]
    pack = make_pack(bounds, device)
    return MicroBatch(rows_T, tokens, torch.zeros_like(tokens), padding, pack, kept_T)

"""Positions of packed tokens, recomputed activations, and the kernels' plain twins."""

from __future__ import annotations

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from vime.backends.megatron.kernels import many_tensors, reference, weight_gradient
from vime.backends.megatron.kernels.choice import VARIABLE, chosen
from vime.backends.megatron.model.pack import bounds_of, make_pack, positions_of
from vime.backends.megatron.model.recompute import free_until_backward, recomputable
from vime.backends.megatron.model.zigzag import seen_by, zigzag_order
from vime.errors import ConfigError

LENGTHS = (8, 16, 4, 4, 32)


def pack_of(lengths: tuple[int, ...]) -> PackedSeqParams:
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    return make_pack(bounds, torch.device("cpu"))


@pytest.mark.parametrize("cp", [1, 2])
def test_positions_count_from_each_sequences_start_in_every_share(cp: int) -> None:
    whole = torch.cat([torch.arange(n) for n in LENGTHS])
    shards = torch.empty_like(whole)
    shards[zigzag_order(bounds_of(pack_of(LENGTHS)), cp)] = whole
    for rank, expected in enumerate(shards.chunk(cp)):
        found = positions_of(pack_of(LENGTHS), len(expected), cp, rank)
        assert torch.equal(found.long(), expected)


@pytest.mark.parametrize("size", [2, 4])
def test_a_query_chunk_sees_its_sequence_up_to_its_own_end(size: int) -> None:
    lengths = tuple(2 * size * n for n in (1, 3, 2))
    bounds = bounds_of(pack_of(lengths))
    order = zigzag_order(bounds, size)
    rows_in_shards = torch.empty(bounds[-1], dtype=torch.long)
    rows_in_shards[order] = torch.arange(bounds[-1])  # the pack's row at each place of the shards
    for rank, mine in enumerate(rows_in_shards.chunk(size)):
        rows, queries, keys = seen_by(bounds, size, rank)
        query_parts = mine.split(queries.lengths)
        key_parts = rows_in_shards[rows].split(keys.lengths)
        assert len(query_parts) == len(key_parts) == 2 * len(lengths)
        for query, key in zip(query_parts, key_parts, strict=True):
            first = max(a for a in bounds if a <= query[0])
            assert torch.equal(key, torch.arange(first, query[-1] + 1))


def test_a_pack_that_megatron_made_has_bounds_too() -> None:
    starts = torch.tensor([0, 3, 7], dtype=torch.int32)
    assert bounds_of(PackedSeqParams("thd", starts, starts)) == [0, 3, 7]


def test_a_recomputed_activation_is_not_kept_and_gives_the_same_gradient() -> None:
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    made = 0

    def make() -> torch.Tensor:
        nonlocal made
        made += 1
        return reference.swiglu(x)

    def gradients(again: bool) -> tuple[torch.Tensor, ...]:
        active = reference.swiglu(x)
        if again:
            recomputable(active, make)
        out = torch.nn.functional.linear(active, weight)
        free_until_backward(active, out)
        assert active.numel() == (0 if again else 24)
        return torch.autograd.grad(out.square().sum(), (x, weight))

    expected = gradients(again=False)
    assert made == 0
    for a, b in zip(gradients(again=True), expected, strict=True):
        assert torch.equal(a, b)
    assert made == 1


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_keeps_lengths_and_only_distances_matter(interleaved: bool) -> None:
    """The product of a query and a key depends on the distance between their positions alone."""
    q, k = torch.randn(1, 1, 12), torch.randn(1, 1, 12)
    angle = torch.rand(4)

    def at(x: torch.Tensor, position: int) -> torch.Tensor:
        cos, sin = ((position * angle).cos(), (position * angle).sin())
        return reference.rotate(x, cos[None, None], sin[None, None], interleaved)

    torch.testing.assert_close((at(q, 7) * at(k, 3)).sum(), (at(q, 14) * at(k, 10)).sum())
    torch.testing.assert_close(at(q, 5).norm(), q.norm())
    assert torch.equal(at(q, 5)[..., 8:], q[..., 8:])


def test_without_a_gpu_the_kernels_are_pytorchs_and_an_unknown_choice_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA, so Triton's kernels are chosen")
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not chosen.__wrapped__().fused
    monkeypatch.setenv(VARIABLE, "attention=flash")
    said = "VIME_KERNELS=attention=flash is unknown. Choose one of plain"
    with pytest.raises(ConfigError, match=said):
        chosen.__wrapped__()


def test_norms_and_copies_of_many_tensors_equal_those_of_single_tensors() -> None:
    tensors = [torch.randn(3, 4), torch.randn(5), torch.zeros(0)]
    norm, _ = many_tensors.l2_norm(0, None, [tensors], False)
    torch.testing.assert_close(norm, torch.cat([t.flatten() for t in tensors]).norm()[None])
    copies = [torch.empty_like(t, dtype=torch.bfloat16) for t in tensors]
    many_tensors.scale(0, None, [tensors, copies], 1.0)
    assert all(torch.equal(c, t.bfloat16()) for c, t in zip(copies, tensors, strict=True))
    halves = [t / 2 for t in tensors]
    many_tensors.scale(0, None, [tensors, tensors], 0.5)
    assert all(torch.equal(t, h) for t, h in zip(tensors, halves, strict=True))


def test_a_weights_gradient_is_added_to_its_buffer() -> None:
    inputs, grad, buffer = torch.randn(7, 3), torch.randn(7, 2), torch.randn(2, 3)
    expected = buffer + grad.t() @ inputs
    weight_gradient.wgrad_gemm_accum_fp32(inputs, grad, buffer)
    torch.testing.assert_close(buffer, expected)

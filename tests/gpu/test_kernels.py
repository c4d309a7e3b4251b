"""Every kernel against its plain PyTorch twin, values and gradients, in float32 and bfloat16."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vime.backends.megatron.kernels import reference
from vime.backends.megatron.kernels.choice import ATTENTION

DTYPES = [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)]
LENGTHS = [384, 384, 1000, 24, 256]


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def with_gradients(call: Callable[..., Any], *inputs: torch.Tensor | None) -> list[torch.Tensor]:
    """The call's outputs, then the gradients of a random mix of them with respect to the inputs."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    out = call(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    g = torch.Generator("cuda").manual_seed(1)
    loss = sum((o.float() * torch.randn(o.shape, generator=g, device="cuda")).sum() for o in outs)
    wanted = [t for t in leaves if t is not None]
    return [o.detach() for o in outs] + list(torch.autograd.grad(loss, wanted))


def assert_near(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    """Compares each pair: the largest difference, relative to the largest value."""
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        error = (a.float() - b.float()).abs().max() / b.float().abs().max()
        assert error < tolerance, f"{tuple(a.shape)}: {error:.2e}"


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("columns", [96, 1024, 2560])
def test_rms_norm(dtype: torch.dtype, tolerance: float, columns: int) -> None:
    from vime.backends.megatron.kernels import norm

    x, w = rand(3001, 1, columns, dtype=dtype), 1 + 0.1 * rand(columns, dtype=dtype)
    found = with_gradients(lambda x, w: norm.rms_norm(x, w, 1e-6), x, w)
    expected = with_gradients(lambda x, w: reference.rms_norm(x, w, 1e-6), x.double(), w.double())
    assert_near(found, expected, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_swiglu(dtype: torch.dtype, tolerance: float) -> None:
    from vime.backends.megatron.kernels import activation

    x = rand(777, 1, 2 * 3100, dtype=dtype)
    expected = with_gradients(reference.swiglu, x.double())
    assert_near(with_gradients(activation.swiglu, x), expected, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(
    ("width", "rotated", "interleaved", "normed"),
    [
        (128, 128, False, True),
        (128, 64, True, False),
        (80, 80, False, False),
        (64, 32, False, True),
    ],
)
def test_split_qkv(dtype, tolerance, width, rotated, interleaved, normed) -> None:
    from vime.backends.megatron.kernels import qkv

    groups, per_group = 4, 3
    tokens = sum(LENGTHS)
    mixed = rand(tokens, groups * (per_group + 2) * width, dtype=dtype)
    positions = torch.cat([torch.arange(n, device="cuda") for n in LENGTHS]).int()
    angles = torch.outer(torch.arange(1000.0), 10_000 ** -torch.rand(rotated // 2)).cuda()
    tables = angles.cos().to(dtype), angles.sin().to(dtype)
    weights = [1 + 0.1 * rand(width, dtype=dtype) if normed else None for _ in range(2)]

    def call(module: Any, cast: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        def split(mixed: torch.Tensor, *weights: torch.Tensor) -> tuple:
            weights = weights or (None, None)
            rest = (positions, *map(cast, tables), *weights, 1e-6, groups, per_group, interleaved)
            return module.split_qkv(mixed, *rest)

        return with_gradients(split, cast(mixed), *(cast(w) for w in weights if w is not None))

    assert_near(call(qkv, lambda t: t), call(reference, torch.Tensor.double), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("wanted", ["logp", "entropy", "both"])
def test_log_probabilities(dtype: torch.dtype, tolerance: float, wanted: str) -> None:
    from vime.backends.megatron.training.logprobs import token_logprobs

    logits = 3 * rand(333, 151_936, dtype=dtype)
    logits[:, -7:] = -1e30  # padded vocabulary
    taken = torch.randint(0, 151_936 - 7, (333,), device="cuda")

    def fused(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = token_logprobs(x, taken, temperature=0.7, owned=False)
        return {"logp": (out.logp_T,), "entropy": (out.entropy_T,), "both": tuple(out)}[wanted]

    def dense(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logp = (x / 0.7).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        picked = logp.gather(-1, taken[:, None])[:, 0]
        return {"logp": (picked,), "entropy": (entropy,), "both": (picked, entropy)}[wanted]

    assert_near(with_gradients(fused, logits), with_gradients(dense, logits.double()), tolerance)


def test_log_probabilities_make_no_copy_of_the_logits() -> None:
    from vime.backends.megatron.training.logprobs import token_logprobs

    logits = rand(2048, 151_936, dtype=torch.bfloat16).requires_grad_()
    size = logits.numel() * 2
    taken = torch.zeros(2048, dtype=torch.long, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    source = logits * 1  # like the result of an output layer
    out = token_logprobs(source, taken, owned=True)
    del source
    out.logp_T.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2.2 * size  # the source and a leaf's .grad


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize(("heads", "groups"), [(8, 8), (8, 2)])
def test_attention(name: str, heads: int, groups: int) -> None:
    from vime.backends.megatron.kernels.attention import attend
    from vime.backends.megatron.kernels.attention_trial import missing
    from vime.backends.megatron.kernels.spans import Spans

    if problem := missing(name):
        pytest.skip(problem)
    spans = Spans.of([0, *itertools.accumulate(LENGTHS)], "cuda")
    q, k, v = pack_of_heads(heads, groups)
    found = with_gradients(lambda *t: attend(name, *t, spans, spans, None), q, k, v)
    assert_near(found, with_gradients(dense_attention, q.float(), k.float(), v.float()), 2e-2)


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("size", [2, 4])
def test_attention_of_all_ranks_of_context_parallelism(name: str, size: int) -> None:
    from vime.backends.megatron.kernels.attention import attend
    from vime.backends.megatron.kernels.attention_trial import missing
    from vime.backends.megatron.model.zigzag import seen_by, zigzag_order

    if problem := missing(name):
        pytest.skip(problem)
    bounds = [0, *itertools.accumulate(LENGTHS)]
    order = zigzag_order(bounds, size).cuda()

    def by_ranks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        shards = [torch.empty_like(t).index_copy(0, order, t) for t in (q, k, v)]
        outs = []
        for rank, query in enumerate(shards[0].chunk(size)):
            rows, queries, keys = seen_by(bounds, size, rank, "cuda")
            key, value = (t.index_select(0, rows) for t in shards[1:])
            outs.append(attend(name, query, key, value, queries, keys, None))
        return torch.cat(outs)[order]

    q, k, v = pack_of_heads(8, 2)
    found = with_gradients(by_ranks, q, k, v)
    assert_near(found, with_gradients(dense_attention, q.float(), k.float(), v.float()), 2e-2)


def pack_of_heads(heads: int, groups: int) -> list[torch.Tensor]:
    shapes = [(sum(LENGTHS), n, 128) for n in (heads, groups, groups)]
    return [rand(*shape, dtype=torch.bfloat16) for shape in shapes]


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    outs = []
    for part in zip(*(t.split(LENGTHS) for t in (q, k, v)), strict=True):
        one = [t.transpose(0, 1)[None] for t in part]
        out = F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("buffer", [torch.float32, torch.bfloat16])
def test_weight_gradients_are_added_to_the_buffer(buffer: torch.dtype) -> None:
    from vime.backends.megatron.kernels import weight_gradient

    inputs, grad = (rand(4096, n, dtype=torch.bfloat16) for n in (320, 192))
    main_grad = 10 * rand(192, 320, dtype=buffer)
    expected = main_grad.double() + grad.double().t() @ inputs.double()
    add = weight_gradient.wgrad_gemm_accum_fp32
    if buffer == torch.bfloat16:
        add = weight_gradient.wgrad_gemm_accum_fp16
    add(inputs, grad, main_grad)
    assert_near([main_grad], [expected], 1e-5 if buffer == torch.float32 else 1e-2)

"""The Triton kernels of `qkv.py`: one program per block of tokens, in the forward also per head."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pairs(channel, rotated, INTERLEAVED: tl.constexpr):
    """(partner, frequency, sign) of each channel: y = x * cos + sign * x[partner] * sin."""
    if INTERLEAVED:
        first = channel % 2 == 0
        partner = tl.where(first, channel + 1, channel - 1)
        frequency = channel // 2
    else:
        half = rotated // 2
        first = channel < half
        partner = tl.where(first, channel + half, channel - half)
        frequency = tl.where(first, channel, channel - half)
    turned = channel < rotated
    sign = tl.where(first, -1.0, 1.0)
    return tl.where(turned, partner, channel), tl.where(turned, frequency, 0), sign, turned


@triton.jit
def _weight(QWeight, KWeight, is_query, channel, real):
    q = tl.load(QWeight + channel, mask=real, other=0.0)
    k = tl.load(KWeight + channel, mask=real, other=0.0)
    return tl.where(is_query, q, k).to(tl.float32)


@triton.jit
def forward(
    Mixed,
    QWeight,
    KWeight,
    Positions,
    Cos,
    Sin,
    Query,
    Key,
    tokens,
    width,
    rotated,
    eps,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    NORMED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    group = tl.program_id(1) // (PER_GROUP + 1)
    member = tl.program_id(1) % (PER_GROUP + 1)
    channel = tl.arange(0, WIDTH)[None, :]
    real = channel < width
    inside = (token < tokens) & real
    partner, frequency, sign, turned = _pairs(channel, rotated, INTERLEAVED)
    row = Mixed + token * (GROUPS * (PER_GROUP + 2) * width)
    row += (group * (PER_GROUP + 2) + member) * width
    x = tl.load(row + channel, mask=inside, other=0.0).to(tl.float32)
    x_partner = tl.load(row + partner, mask=inside, other=0.0).to(tl.float32)
    if NORMED:
        scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / width + eps)[:, None]
        is_query = member < PER_GROUP
        x *= scale * _weight(QWeight, KWeight, is_query, channel, real)
        x_partner *= scale * _weight(QWeight, KWeight, is_query, partner, real)
    position = tl.load(Positions + token, mask=token < tokens, other=0).to(tl.int64)
    table = position * (rotated // 2) + frequency
    cos = tl.load(Cos + table, mask=inside & turned, other=1.0).to(tl.float32)
    sin = tl.load(Sin + table, mask=inside & turned, other=0.0).to(tl.float32)
    y = x * cos + sign * x_partner * sin
    if member < PER_GROUP:
        out = Query + (token * GROUPS * PER_GROUP + group * PER_GROUP + member) * width
        tl.store(out + channel, y.to(Query.dtype.element_ty), mask=inside)
    else:
        out = Key + (token * GROUPS + group) * width
        tl.store(out + channel, y.to(Key.dtype.element_ty), mask=inside)


@triton.jit
def _turn_back(dY, start, partner, cos, sin, sign, channel, inside):
    """The rotation's gradient: a rotation the other way."""
    dy = tl.load(dY + start + channel, mask=inside, other=0.0).to(tl.float32)
    dy_partner = tl.load(dY + start + partner, mask=inside, other=0.0).to(tl.float32)
    return dy * cos - sign * dy_partner * sin


@triton.jit
def _norm_back(dy, x, w, width, eps):
    """(gradient of x, of the weight per row) of x * scale(x) * w."""
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / width + eps)[:, None]
    x *= scale
    dw = dy * x
    dy *= w
    return (dy - x * (tl.sum(dy * x, 1) / width)[:, None]) * scale, dw


@triton.jit
def backward(
    dQuery,
    dKey,
    dValue,
    Mixed,
    QWeight,
    KWeight,
    Positions,
    Cos,
    Sin,
    dMixed,
    Partial,
    tokens,
    width,
    rotated,
    eps,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    NORMED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One block of tokens, every head. Also writes partial sums of the norm weights' gradients."""
    block = tl.program_id(0)
    token = (block * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    real = channel < width
    inside = (token < tokens) & real
    partner, frequency, sign, turned = _pairs(channel, rotated, INTERLEAVED)
    position = tl.load(Positions + token, mask=token < tokens, other=0).to(tl.int64)
    table = position * (rotated // 2) + frequency
    cos = tl.load(Cos + table, mask=inside & turned, other=1.0).to(tl.float32)
    sin = tl.load(Sin + table, mask=inside & turned, other=0.0).to(tl.float32)
    q_weight = tl.load(QWeight + channel, mask=real, other=0.0).to(tl.float32)
    k_weight = tl.load(KWeight + channel, mask=real, other=0.0).to(tl.float32)
    dw_q = tl.zeros((TOKENS, WIDTH), tl.float32)
    dw_k = tl.zeros((TOKENS, WIDTH), tl.float32)
    for group in range(GROUPS):
        row = token * (GROUPS * (PER_GROUP + 2) * width) + group * (PER_GROUP + 2) * width
        for member in range(PER_GROUP):
            head = (token * GROUPS * PER_GROUP + group * PER_GROUP + member) * width
            dx = _turn_back(dQuery, head, partner, cos, sin, sign, channel, inside)
            if NORMED:
                here = Mixed + row + member * width + channel
                x = tl.load(here, mask=inside, other=0.0).to(tl.float32)
                dx, dw = _norm_back(dx, x, q_weight, width, eps)
                dw_q += dw
            out = dMixed + row + member * width + channel
            tl.store(out, dx.to(dMixed.dtype.element_ty), mask=inside)
        head = (token * GROUPS + group) * width
        dx = _turn_back(dKey, head, partner, cos, sin, sign, channel, inside)
        if NORMED:
            here = Mixed + row + PER_GROUP * width + channel
            x = tl.load(here, mask=inside, other=0.0).to(tl.float32)
            dx, dw = _norm_back(dx, x, k_weight, width, eps)
            dw_k += dw
        out = dMixed + row + PER_GROUP * width + channel
        tl.store(out, dx.to(dMixed.dtype.element_ty), mask=inside)
        dv = tl.load(dValue + head + channel, mask=inside, other=0.0)
        tl.store(out + width, dv, mask=inside)
    if NORMED:
        at = tl.arange(0, WIDTH)
        partial = Partial + block.to(tl.int64) * width + at
        tl.store(partial, tl.sum(dw_q, 0), mask=at < width)
        blocks = tl.num_programs(0).to(tl.int64)
        tl.store(partial + blocks * width, tl.sum(dw_k, 0), mask=at < width)

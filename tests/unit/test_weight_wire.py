"""Buckets, packing, and calls that wait for each other. Needs no engine."""

from __future__ import annotations

import threading

import pytest
import torch

from vime.errors import EngineError
from vime.weight_sync import wire
from vime.weight_sync.together import run_together


def named(*shapes, dtype=torch.float32):
    return [(f"t{i}", torch.randn(s).to(dtype)) for i, s in enumerate(shapes)]


def test_unpack_returns_the_packed_tensors_of_any_dtype():
    bucket = [
        ("odd", torch.randn(3, 5)),
        ("half", torch.randn(7).to(torch.bfloat16)),
        ("flag", torch.tensor([True, False, True])),
        ("scalar", torch.tensor(3.5, dtype=torch.float64)),
        ("strided", torch.randn(4, 6).t()),
    ]
    entries = wire.entries_of(bucket)
    packed = torch.empty(wire.size_of(entries), dtype=torch.uint8)
    wire.pack(bucket, packed)
    for (name, tensor), (got_name, got) in zip(bucket, wire.unpack(packed, entries), strict=True):
        assert name == got_name
        assert got.dtype == tensor.dtype
        assert torch.equal(got, tensor)


def test_buckets_keep_the_order_and_the_limit():
    tensors = named((16,), (16,), (16,), (100,), (16,))  # 64 bytes each, one of 448
    found = list(wire.buckets(iter(tensors), 128))
    assert [[n for n, _ in b] for b in found] == [["t0", "t1"], ["t2"], ["t3"], ["t4"]]


def test_a_checksum_sees_one_bit_and_the_shape():
    a = torch.randn(4, 4)
    b = a.clone()
    assert wire.checksum(a) == wire.checksum(b)
    assert wire.checksum(a) != wire.checksum(a.view(2, 8))
    b.view(torch.int32)[1, 1] ^= 1
    assert wire.checksum(a) != wire.checksum(b)


def test_calls_that_wait_for_each_other_run_together():
    barrier = threading.Barrier(3, timeout=60)
    assert sorted(run_together([barrier.wait] * 3, 60, "meeting")) == [0, 1, 2]


def test_a_failure_is_raised_at_once_while_other_calls_wait():
    def fail():
        raise EngineError("engine 1 refused")

    told, returned = threading.Event(), []
    with pytest.raises(EngineError, match="engine 1 refused"):
        run_together([lambda: returned.append(told.wait(60)), fail], 120, "update")
    assert returned == []
    told.set()


def test_the_error_for_a_call_that_never_returns_names_the_flag():
    told = threading.Event()
    with pytest.raises(EngineError, match="weight-transfer-timeout-sec"):
        run_together([lambda: told.wait(60)], 0.1, "update")
    told.set()

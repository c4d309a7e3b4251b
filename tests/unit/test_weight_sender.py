"""The order of the calls in an update, also when one fails. The engines only record calls."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.cpu.tiny import make_config
from vime.errors import EngineError
from vime.weight_sync import shared_memory, wire
from vime.weight_sync.broadcast import Broadcast
from vime.weight_sync.engines import BROKEN
from vime.weight_sync.sender import WeightSender, make_sender
from vime.weight_sync.shared_memory import SharedMemory

WEIGHTS = [(f"w{i}", torch.randn(8, 8)) for i in range(5)]


class Notes:
    """An engine that records its calls and reads the buckets that it gets."""

    url = "http://127.0.0.1:9"

    def __init__(self, fail_on: str = "", acknowledges: int | None = None) -> None:
        self.calls: list[str] = []
        self.fail_on = fail_on
        self.acknowledges = acknowledges
        self.held: dict[str, torch.Tensor] = {}
        self.received: dict[str, str] = {}
        self.group = None

    def note(self, call: str) -> None:
        self.calls.append(call)
        if call == self.fail_on:
            raise EngineError(f"no {call} today")

    def world_size(self) -> int:
        return 1

    def init_weight_transfer(self, info):
        if "port" in info:
            rank, size = info["rank_offset"], info["world_size"]
            self.group = wire.join_group("gloo", info["host"], info["port"], rank, size, 20)

    def pause(self, mode):
        self.note(f"pause {mode}")

    def start_weight_update(self):
        self.note("start")

    def update_weights(self, info):
        self.note("update")
        size = wire.size_of(info["entries"])
        if "paths" in info:
            (path,) = info["paths"].values()
            packed = torch.from_file(path, shared=False, size=size, dtype=torch.uint8)
        else:
            packed = torch.empty(size, dtype=torch.uint8)
            wire.broadcast(self.group, packed)
        self.held |= {n: t.clone() for n, t in wire.unpack(packed, info["entries"])}

    def finish_weight_update(self):
        self.note("finish")

    def reset_prefix_cache(self):
        self.note("reset")

    def set_weight_version(self, version):
        self.note(f"version {version}")
        return [version if self.acknowledges is None else self.acknowledges]

    def record_checksums(self):
        self.note("record")

    def checksums(self):
        return [{n: wire.checksum(t) for n, t in self.held.items()} | self.received]

    def resume(self):
        self.note("resume")


def sender(*clients, rank=0, **kw):
    kw = {"rank": rank, "bucket_bytes": 512, "timeout_s": 10} | kw
    return WeightSender(list(clients), SharedMemory(list(clients), 10), **kw)


def test_an_update_pauses_sends_acknowledges_and_resumes_in_this_order():
    engine = Notes()
    report = sender(engine).send(iter(WEIGHTS), 7)
    update = ["pause keep", "start", *["update"] * 3, "finish", "reset", "version 7", "resume"]
    assert engine.calls == update
    assert (report.version, report.tensors, report.buckets) == (7, 5, 3)
    assert report.bytes == 5 * 256
    assert all(torch.equal(engine.held[n], t) for n, t in WEIGHTS)


def test_sleeping_engines_are_neither_paused_nor_resumed():
    """vLLM would schedule onto a KV cache that has no memory yet."""
    engine, broken = Notes(), Notes(fail_on="update")
    sender(engine, engines_asleep=True).send(iter(WEIGHTS), 7)
    assert engine.calls == ["start", *["update"] * 3, "finish", "reset", "version 7"]
    with pytest.raises(EngineError, match="today"):
        sender(broken, engines_asleep=True).send(iter(WEIGHTS), 7)
    assert broken.calls == ["start", "update", "finish", f"version {BROKEN}"]


@pytest.mark.parametrize("call", ["pause keep", "start", "update", "finish", "version 7"])
def test_engines_resume_after_any_call_fails(call):
    broken, healthy = Notes(fail_on=call), Notes()
    with pytest.raises(EngineError, match="today"):
        sender(broken, healthy).send(iter(WEIGHTS), 7)
    assert broken.calls[-1] == "resume"
    assert healthy.calls[-1] == "resume"


def test_a_failed_update_is_ended_and_the_engine_is_marked():
    broken = Notes(fail_on="update")
    with pytest.raises(EngineError, match="no update today"):
        sender(broken).send(iter(WEIGHTS), 7)
    assert broken.calls[-3:] == ["finish", f"version {BROKEN}", "resume"]


def test_an_engine_that_acknowledges_another_version_raises_an_error():
    with pytest.raises(EngineError, match=r"holds weight versions \[6\] after an update to 7"):
        sender(Notes(), Notes(acknowledges=6)).send(iter(WEIGHTS), 7)


def test_the_export_is_read_to_its_end_when_an_engine_fails():
    exported = []
    weights = ((exported.append(n) or n, t) for n, t in WEIGHTS)
    with pytest.raises(EngineError, match="no update today"):
        sender(Notes(fail_on="update")).send(weights, 7)
    assert len(exported) == len(WEIGHTS)


class Counts(SharedMemory):
    """Counts buckets. The ranks meet at each, so each must be sent or skipped once."""

    met = 0

    def send(self, bucket):
        self.met += 1
        return super().send(bucket)

    def skip(self):
        self.met += 1


@pytest.mark.parametrize("call", ["pause keep", "start", "update", "finish"])
def test_no_other_rank_waits_in_vain_after_any_call_fails(call):
    broken = sender(Notes(fail_on=call))
    broken.transport = Counts(broken.engines.clients, 10)
    with pytest.raises(EngineError, match="today"):
        broken.send(iter(WEIGHTS), 7)
    assert broken.transport.met == 3


def test_the_first_bucket_is_gathered_while_the_engines_pause():
    exported, seen = threading.Event(), []

    class Slow(Notes):
        def pause(self, mode):
            seen.append(exported.wait(10))
            super().pause(mode)

    def weights():
        for i, named in enumerate(WEIGHTS):
            if i == 2:  # two fill a bucket
                exported.set()
            yield named

    sender(Slow()).send(weights(), 7)
    assert seen == [True]


def test_other_ranks_export_and_call_no_engine():
    engine, exported = Notes(), []
    weights = ((exported.append(n) or n, t) for n, t in WEIGHTS)
    assert sender(engine, rank=1).send(weights, 7).version == 7
    assert len(exported) == len(WEIGHTS)
    assert engine.calls == []


def test_a_checksum_finds_different_bytes():
    honest = Notes()
    sender(honest, compare_checksums=True).send(iter(WEIGHTS), 1)
    damaged = Notes()
    damaged.received = {"w3": "00"}
    with pytest.raises(EngineError, match="1 of 5 tensors, among them w3"):
        sender(damaged, compare_checksums=True).send(iter(WEIGHTS), 2)


def test_checksums_find_a_tensor_that_was_not_sent():
    engine = Notes()
    engine.received = {"extra": "00"}
    with pytest.raises(EngineError, match="extra"):
        sender(engine, compare_checksums=True).send(iter(WEIGHTS), 1)


def test_gloo_reaches_every_engine():
    engines = [Notes(), Notes()]
    transport = Broadcast(engines, 20, "gloo", torch.device("cpu"))
    gloo = WeightSender(engines, transport, rank=0, bucket_bytes=512, timeout_s=20)
    gloo.connect()
    gloo.send(iter(WEIGHTS), 3)
    for engine in engines:
        assert all(torch.equal(engine.held[n], t) for n, t in WEIGHTS)
    gloo.close()


@pytest.mark.parametrize("nearest", [0, 1])
def test_every_engine_meets_the_trainer_at_the_address_of_the_trainers_node(nearest):
    """Also if the first engine, or the second, is on the trainer's own node."""

    class Told(Notes):
        def init_weight_transfer(self, info):
            self.told = info["host"]
            super().init_weight_transfer(info)

    engines = [Told(), Told()]
    engines[1 - nearest].url = "http://10.0.0.7:9"
    gloo = Broadcast(engines, 20, "gloo", torch.device("cpu"), "127.0.0.3")
    gloo.connect()
    assert [engine.told for engine in engines] == ["127.0.0.3", "127.0.0.3"]
    gloo.close()


def test_an_engine_that_refuses_to_join_does_not_hang_the_trainer():
    class Refuses(Notes):
        def init_weight_transfer(self, info):
            raise EngineError("wrong backend")

    gloo = Broadcast([Refuses()], 1, "gloo", torch.device("cpu"))
    with pytest.raises(EngineError, match="wrong backend"):
        gloo.connect()
    for thread in threading.enumerate():
        if thread.name.startswith("joining over gloo"):
            thread.join(20)  # a thread that waits in gloo breaks the exit of the interpreter


def test_debug_train_only_sends_nothing(tmp_path):
    cfg = make_config(tmp_path, debug={"train_only": True})
    engine = Notes()
    only_trainer = make_sender(cfg, [engine], 0)
    only_trainer.connect()
    assert only_trainer.send(iter(WEIGHTS), 1).tensors == 0
    assert engine.calls == []


def test_no_file_stays_in_shared_memory(tmp_path, monkeypatch):
    # Another run on this machine may be sending weights, so the test has a folder of its own.
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path)
    with pytest.raises(EngineError, match="no update today"):
        sender(Notes(fail_on="update")).send(iter(WEIGHTS), 7)
    sender(Notes()).send(iter(WEIGHTS), 8)
    assert list(tmp_path.iterdir()) == []

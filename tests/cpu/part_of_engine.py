"""A node of `test_engine_over_two_nodes.py`: a trainer rank and the owner of a part of an engine.

`python -m tests.cpu.part_of_engine RANK OWN_ADDRESS FIRST_ADDRESS HF_DIR RUN_DIR`

It prints the observations of its rank as JSON, on the last line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.cpu.test_live_engine import (
    generate,
    hf_log_probs,
    log_probs_of,
    new_weights,
    spans_of,
)
from tests.cpu.tiny import make_config
from vime.backends.vllm.client import EngineClient
from vime.backends.vllm.engine import Meeting, VLLMEngine
from vime.config import Config
from vime.errors import EngineError
from vime.rendezvous import interface_variables, listening_store
from vime.weight_sync import shared_memory
from vime.weight_sync.sender import make_sender

TIMEOUT_S = 300.0


class Node:
    """The trainer rank of a node, and the owner of its part of the engine."""

    def __init__(self, rank: int, own: str, first: str, hf_dir: Path, run_dir: Path) -> None:
        self.rank, self.own, self.hf_dir, self.run_dir = rank, own, hf_dir, run_dir
        os.environ.update(interface_variables(own, os.environ))
        join(rank, own, first, run_dir / "port")
        # Both networks of the test have one /dev/shm.
        shared_memory.SHARED_MEMORY = run_dir / own
        shared_memory.SHARED_MEMORY.mkdir()
        self.engine = VLLMEngine(self.cfg(True), 0, [0], host=own, part=rank, num_parts=2)
        self.url = ""

    def cfg(self, colocate: bool) -> Config:
        cluster = {"actor_num_nodes": 2, "actor_gpus_per_node": 1, "gpus_per_engine": 2}
        return make_config(
            self.hf_dir,
            cluster={**cluster, "colocate": colocate},
            engine={"update_weight_buffer_size": 100_000, "check_weight_update_equal": True},
            log={"run_dir": str(self.run_dir)},
        )

    def start(self, colocate: bool) -> None:
        """Start all parts, and connect the trainer with them."""
        self.engine.cfg = self.cfg(colocate)
        meeting: list[Meeting | None] = [None]
        if self.rank == 0:
            meeting = [self.engine.meet(self.url or None)]
        dist.broadcast_object_list(meeting, src=0)
        url = self.engine.start(meeting=meeting[0])
        assert self.url in ("", url)
        self.url, client = url, EngineClient(url, timeout_s=60)
        self.sender = make_sender(self.engine.cfg, [client], self.rank, host=self.own)
        self.sender.connect()

    def update(self, version: int) -> dict[str, Any]:
        """Send new weights. Rank 0 compares the engine's answer with transformers' model."""
        model, weights = new_weights(self.hf_dir, seed=version)
        self.sender.send(iter(weights), version)
        self.engine.check()
        if self.rank > 0:
            return {}
        answer = generate(self.url, 24, seed=1)
        return {
            "versions": EngineClient(self.url).weight_versions(),
            "spans": spans_of(answer),
            "worst": float((log_probs_of(answer) - hf_log_probs(model, answer)).abs().max()),
        }

    def send_wrong_weights(self) -> str:
        """The error of an update in which the file of the second node has other weights."""
        _, weights = new_weights(self.hf_dir, seed=7 + self.rank)
        try:
            self.sender.send(iter(weights), 7)
        except EngineError as error:
            return str(error)
        return ""

    def lose_second_part(self) -> str:
        """What the owner of the second part says after its workers were killed."""
        dist.barrier()  # rank 0 is done with the engine
        if self.rank == 1:
            os.killpg(self.engine.process.guard.pid, signal.SIGKILL)
            self.engine.process.guard.wait()
        dist.barrier()
        try:
            if self.rank == 1:
                self.engine.check()
        except EngineError as error:
            return str(error)
        finally:
            self.engine.stop()
            dist.barrier()
        return ""


def join(rank: int, own: str, first: str, note: Path) -> None:
    """Join the gloo group of both ranks. Rank 0 leaves its port in the file `note`."""
    if rank == 0:
        store = listening_store(own, TIMEOUT_S)
        note.with_suffix(".partial").write_text(str(store.port))
        note.with_suffix(".partial").rename(note)
    else:
        while not note.exists():
            time.sleep(0.05)
        port = int(note.read_text())
        store = dist.TCPStore(first, port, None, timeout=timedelta(seconds=TIMEOUT_S))
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT_S)
    )


def main() -> None:
    rank, own, first, hf_dir, run_dir = sys.argv[1:]
    node = Node(int(rank), own, first, Path(hf_dir), Path(run_dir))
    seen: dict[str, Any] = {}
    try:
        node.start(colocate=True)
        seen["shared memory"] = node.update(1)
        seen["wrong"] = node.send_wrong_weights()
        seen["files"] = [path.name for path in (node.run_dir / own).iterdir()]
        seen["lost"] = node.lose_second_part()
        node.start(colocate=False)
        seen["broadcast"] = node.update(2)
        dist.barrier()
    finally:
        print(json.dumps(seen), file=sys.stderr)
        node.engine.stop()
    print(json.dumps(seen), flush=True)
    os._exit(0)  # an orderly exit could wait for process groups


if __name__ == "__main__":
    main()

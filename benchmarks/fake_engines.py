"""Many fake engines in one process. Each listens on a port and answers with tokens made before.

    python benchmarks/fake_engines.py '{"num": 128, "num_tokens": 8192, "vocab": 151936}'

The first line of the output is a JSON list of ports. The process ends when its input ends. Answers
have the format of `vime/backends/vllm/plugin_route.py`. They are cheap, so that the fake engines
leave the cores to the client.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ANSWERS = 32  # different answers, which take turns


def bodies(num_tokens: int, vocab: int, seed: int) -> list[bytes]:
    """Complete HTTP answers. A token has four characters of text, and none repeats itself."""
    from vime.backends.vllm.plugin_route import pack  # needs msgspec, which comes with vLLM

    rng = np.random.default_rng(seed)
    made = []
    for _ in range(ANSWERS):
        output = SimpleNamespace(
            finish_reason="stop",
            token_ids=rng.integers(256, vocab, num_tokens, np.int32),
            logprobs=FlatLogprobs((-rng.random(num_tokens, np.float32)).tolist()),
            weight_versions=[SimpleNamespace(version="3", start=0, end=num_tokens)],
        )
        letters = rng.integers(97, 123, 4 * num_tokens, np.uint8)
        body = pack(output, letters.tobytes().decode())
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\n"
        made.append(head + b"content-length: %d\r\n\r\n" % len(body) + body)
    return made


class FlatLogprobs:
    """As in vLLM: the log-probabilities of all tokens, and where each token's begin."""

    def __init__(self, logprobs: list[float]) -> None:
        self.logprobs, self.start_indices = logprobs, range(len(logprobs))


HEALTHY = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


class FakeEngine(asyncio.Protocol):
    """One connection. Requests come one after the other, as the router sends them.

    hold_s  an answer waits for a random time up to this, so that requests are open together
    """

    def __init__(self, answers: list[bytes], hold_s: float) -> None:
        self.answers, self.hold_s = answers, hold_s
        self.buffer = bytearray()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self.buffer[:end]).lower()
            size = end + 4 + _content_length(head)
            if len(self.buffer) < size:
                return
            del self.buffer[:size]
            if not head.startswith(b"post /inference"):
                self.transport.write(HEALTHY)
            elif self.hold_s:
                wait_s = random.uniform(0, self.hold_s)
                asyncio.get_running_loop().call_later(wait_s, self._answer)
            else:
                self._answer()

    def _answer(self) -> None:
        self.transport.write(random.choice(self.answers))


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.split(b":", 1)[1])
    return 0


async def serve(options: dict[str, Any]) -> None:
    """Listens until the input ends."""
    loop = asyncio.get_running_loop()
    answers = bodies(options["num_tokens"], options["vocab"], options.get("seed", 0))
    servers = [
        await loop.create_server(
            lambda: FakeEngine(answers, options.get("hold_s", 0.0)), "127.0.0.1", 0, backlog=1024
        )
        for _ in range(options["num"])
    ]
    print(json.dumps([s.sockets[0].getsockname()[1] for s in servers]), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


def main() -> None:
    from uvloop import new_event_loop

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(serve(json.loads(sys.argv[1])))


if __name__ == "__main__":
    main()

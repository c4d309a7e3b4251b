"""An HTTP server that speaks the engine's wire format, in a thread, for the rollout's tests."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from aiohttp import web

from vime.addresses import LOOPBACK, url_of
from vime.backends.vllm.router import address_in_args
from vime.config import Config
from vime.config.view import ArgsView

UNTIL_ABORTED = math.inf  # seconds
VOCAB = ["\n"] + [chr(c) for c in range(32, 127)]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer with one token per character, so that tests can read ids, and ChatML."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {text: i for i, text in enumerate(SPECIAL + VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.add_special_tokens({"additional_special_tokens": SPECIAL})
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return folder


def ids_of(text: str) -> list[int]:
    return [len(SPECIAL) + VOCAB.index(c) for c in text]


def make_config(hf: Path | str, **sections: dict[str, Any]) -> Config:
    """A Config with defaults everywhere; `rollout={"partial": True}` sets fields of a section."""
    required = {"model": {"hf_checkpoint": str(hf)}, "batch": {"prompts": 2}}
    types = get_type_hints(Config)
    return Config(
        **{
            name: types[name](**(required.get(name, {}) | sections.get(name, {})))
            for name in Config.__dataclass_fields__
        }
    )


def write_prompts(path: Path, count: int) -> Path:
    rows = [{"prompt": f"q{i}", "label": str(i), "metadata": {"i": i}} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass
class FakeEngine:
    """A server whose answers a test decides.

    answer   (prompt ids, params) -> (token ids, seconds that they take, or UNTIL_ABORTED). An
             aborted request gets the first half of its tokens
    faults   HTTP statuses to answer with first; None drops the connection
    at_once  number of requests that must have arrived before any is answered
    log      the body of every request
    """

    answer: Callable[[list[int], dict], tuple[list[int], float]]
    faults: list[int | None] = field(default_factory=list)
    at_once: int = 0
    version: int | None = 7
    log: list[dict] = field(default_factory=list)
    sessions: list[str | None] = field(default_factory=list)
    num_aborts: int = 0
    with_log_probs: bool = True
    api_key: str | None = None
    host: str = LOOPBACK

    def __enter__(self) -> FakeEngine:
        self._loop = asyncio.new_event_loop()
        self._abort: set[asyncio.Event] = set()
        ready = threading.Event()

        async def serve() -> None:
            app = web.Application(client_max_size=1 << 26)
            app.router.add_post("/inference/v1/generate", self._generate)
            app.router.add_get("/health", self._healthy)
            app.router.add_post("/pause", self._pause)
            app.router.add_post("/resume", self._resume)
            self._runner = web.AppRunner(app, shutdown_timeout=0.1)
            await self._runner.setup()
            site = web.TCPSite(self._runner, self.host, 0)
            await site.start()
            self.port = site._server.sockets[0].getsockname()[1]
            ready.set()

        self._loop.create_task(serve())
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *exc: object) -> None:
        async def close() -> None:
            await self._runner.cleanup()
            waiting = asyncio.all_tasks() - {asyncio.current_task()}  # answers that nobody awaits
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @property
    def url(self) -> str:
        return url_of(self.host, self.port)

    def args(self, cfg: Config, **runtime: Any) -> ArgsView:
        where = address_in_args(self.url)  # no router is in between
        return ArgsView(cfg, vllm_engine_urls=(self.url,), **where, **runtime)

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.Response(status=401, text="Unauthorized")
        if self.faults:
            status = self.faults.pop(0)
            if status is None:
                request.transport.close()
                return web.Response()
            return web.Response(status=status, text="fault on purpose")
        self.log.append(body)
        self.sessions.append(request.headers.get("x-session-id"))
        tokens, seconds = self.answer(body["token_ids"], body["sampling_params"])
        limit = body["sampling_params"]["max_tokens"]
        reason = "length" if len(tokens) > limit else "stop"
        tokens = tokens[:limit]
        aborted = asyncio.Event()
        self._abort.add(aborted)
        try:
            patience = self._loop.time() + 20
            while len(self.log) < self.at_once and self._loop.time() < patience:
                await asyncio.sleep(0.001)
            await asyncio.wait_for(aborted.wait(), seconds)
            tokens, reason = tokens[: len(tokens) // 2], "abort"
        except TimeoutError:
            pass
        finally:
            self._abort.discard(aborted)
        content = [{"token_id": t, "logprob": -t / 1000, "top_logprobs": []} for t in tokens]
        choice = {"index": 0, "token_ids": tokens, "finish_reason": reason}
        choice["logprobs"] = {"content": content} if self.with_log_probs else None
        if self.version is not None:
            span = {"version": str(self.version), "start": 0, "end": len(tokens)}
            choice["weight_versions"] = [span]
        return web.json_response({"request_id": "r", "choices": [choice]})

    async def _healthy(self, request: web.Request) -> web.Response:
        return web.json_response({})

    async def _pause(self, request: web.Request) -> web.Response:
        assert request.query["mode"] == "abort"
        self.num_aborts += 1
        for event in self._abort:
            event.set()
        return web.json_response({})

    async def _resume(self, request: web.Request) -> web.Response:
        return web.json_response({})

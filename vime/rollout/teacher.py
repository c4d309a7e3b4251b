"""--opd-type vllm: a teacher of any size, behind a vLLM server that the user runs.

Requests contain token ids, so the teacher must have the policy's vocabulary.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

import requests

from vime.config import Config
from vime.data import chat
from vime.number_lists import listed
from vime.rollout.failures import Failure, fail
from vime.rollout.posting import Endpoint, RequestFailed
from vime.types import FINISHED, Group, Sample

CHECK_TIMEOUT_S = 10.0
# Text that tokenizers of different models split differently.
PROBE = "In 2048, naïve Ångström   wrote\n\tx_1 = [3.14159, {'k': -70}]; // 你好, мир 🙂"


class TeacherClient:
    """A client of --opd-teacher-url with at most --vllm-server-concurrency requests at once.

    Use it in an `async with` block.
    """

    def __init__(self, address: str, cfg: Config) -> None:
        self.endpoint = Endpoint(f"{address}/v1/completions", cfg.engine.request_timeout_s)
        self.stopped = asyncio.Event()
        self._slots = asyncio.Semaphore(cfg.rollout.concurrency)

    async def __aenter__(self) -> TeacherClient:
        self._session = self.endpoint.session({"Content-Type": "application/json"})
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self._session.close()

    async def judge(self, group: Group) -> None:
        """Gives each finished sample its `teacher_log_probs`, or fails it with the reason.

        A sample that already has them keeps them. Once `stopped` is set, open requests are
        cancelled, and their samples get none.
        """
        todo = [
            s
            for s in group
            if s.teacher_log_probs is None and s.response_length and s.status in FINISHED
        ]
        asking = asyncio.create_task(self._judge_all(todo))
        stopping = asyncio.create_task(self.stopped.wait())
        try:
            await asyncio.wait({asking, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                asking.result()
        finally:
            asking.cancel()
            stopping.cancel()

    async def _judge_all(self, samples: list[Sample]) -> None:
        await asyncio.gather(*(self._judge(sample) for sample in samples))

    async def _judge(self, sample: Sample) -> None:
        # The server must generate at least one token. Nobody reads it.
        body = {
            "prompt": listed(sample, "tokens"),
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 0,
        }
        async with self._slots:
            try:
                answer = await self.endpoint.post(
                    self._session, json.dumps(body).encode(), stopped=self.stopped.is_set
                )
                if answer is not None:
                    sample.teacher_log_probs = self._log_probs_in(answer, sample)
            except RequestFailed as error:
                fail(sample, Failure.TEACHER, error)

    def _log_probs_in(self, answer: bytes, sample: Sample) -> list[float]:
        """[R], a log-probability for each response token. Raises RequestFailed."""
        try:
            entries = json.loads(answer)["choices"][0]["prompt_logprobs"]
            pairs = list(zip(entries, listed(sample, "tokens"), strict=True))[
                sample.prompt_length :
            ]
            return [float(entry[str(token)]["logprob"]) for entry, token in pairs]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise RequestFailed(
                f"{self.endpoint.url} answered without the tokens' log-probabilities ({error!r})"
            ) from None


def teacher_of(cfg: Config) -> AbstractAsyncContextManager[TeacherClient | None]:
    """The client of the teacher's server; None if the run uses no server."""
    address = _address(cfg)
    return nullcontext() if address is None else TeacherClient(address, cfg)


def _address(cfg: Config) -> str | None:
    url = cfg.algorithm.opd_teacher_url if cfg.algorithm.needs_teacher_logp else None
    return None if url is None else url.rstrip("/")


def check_teacher(cfg: Config) -> list[str]:
    """Problems of the server: no answer, another vocabulary, too little room for a sample."""
    address, rollout = _address(cfg), cfg.rollout
    if address is None or cfg.debug.dry_run or cfg.debug.no_engines:
        return []
    name = f"--opd-teacher-url {cfg.algorithm.opd_teacher_url}"
    try:
        served = _json("GET", f"{address}/v1/models")["data"][0]
        asked = {"model": served["id"], "prompt": PROBE, "add_special_tokens": False}
        found = _json("POST", f"{address}/tokenize", asked)["tokens"]
    except (requests.RequestException, ValueError, KeyError, IndexError, TypeError) as error:
        return [
            f"{name} does not answer like a vLLM server ({type(error).__name__}: {error}). "
            "Start it first (`vllm serve TEACHER`), or correct the address."
        ]
    problems = []
    if found != chat.encode(chat.load_tokenizer(cfg.model.hf_checkpoint), [PROBE])[0]:
        problems.append(
            f"{name} serves {served['id']}, whose tokenizer differs from the tokenizer "
            f"of --hf-checkpoint {cfg.model.hf_checkpoint}. Serve a teacher of the policy's "
            "family, so that token ids mean the same text."
        )
    longest = rollout.max_context_len or (rollout.max_prompt_len or 1) + rollout.max_response_len
    room = served.get("max_model_len")
    if room is not None and room <= longest:
        problems.append(
            f"{name} takes {room} tokens. A sample may have {longest}, and the server needs one "
            f"more. Serve it with --max-model-len {longest + 1} or more, or lower "
            "--rollout-max-response-len."
        )
    return problems


def _json(method: str, url: str, body: dict[str, Any] | None = None) -> Any:
    with requests.Session() as session:
        session.trust_env = False  # no proxy, as in the requests of `Endpoint`
        answer = session.request(method, url, json=body, timeout=CHECK_TIMEOUT_S)
    answer.raise_for_status()
    return answer.json()

"""--opd-type vllm: each token gets its log-probability from a server, which is checked before."""

import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.unit.fake_engine import FakeEngine, ids_of, make_config, write_prompts
from vime.data import chat
from vime.data.batching import build_train_batch
from vime.data.columns import as_train_batch
from vime.errors import EngineError
from vime.rollout.data_source import RolloutDataSourceWithBuffer, start_over
from vime.rollout.teacher import check_teacher
from vime.rollout.vllm_rollout import generate_rollout
from vime.types import Sample, Status

ANSWER = [*ids_of("abc"), 2]


@dataclass
class Server:
    """Speaks the part of vLLM's OpenAI API that the teacher needs.

    The log-probability of a token is -(its position + its id / 1000).

    faults    HTTP statuses to answer with first
    is_ready  whether to answer a request for these tokens now; asked repeatedly
    asked     the tokens of every request
    """

    faults: list[int] = field(default_factory=list)
    is_ready: Callable[[list[int]], bool] = lambda tokens: True
    tokenize: Callable[[str], list[int]] = ids_of
    room: int = 1000
    asked: list[list[int]] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)

    def __enter__(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                assert self.path == "/v1/models"
                self.answer({"data": [{"id": "big", "max_model_len": server.room}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/tokenize":
                    assert (body["model"], body["add_special_tokens"]) == ("big", False)
                    self.answer({"tokens": server.tokenize(body["prompt"])})
                else:
                    assert self.path == "/v1/completions"
                    self.complete(body)

            def complete(self, body):
                server.asked.append(body["prompt"])
                if server.faults:
                    self.answer({"error": "on purpose"}, server.faults.pop(0))
                    return
                assert (body["max_tokens"], body["prompt_logprobs"]) == (1, 0)
                while not (server.is_ready(body["prompt"]) or server.closing.wait(0.01)):
                    pass
                entries = [
                    {str(t): {"logprob": -(i + t / 1000)}} for i, t in enumerate(body["prompt"])
                ]
                self.answer({"choices": [{"prompt_logprobs": [None, *entries[1:]]}]})

            def answer(self, value, status=200):
                data = json.dumps(value).encode()
                with contextlib.suppress(ConnectionError):  # the client may be gone
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *words):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def config(hf, tmp_path):
    """make(url, **sections): two groups of two samples; the teacher is the server at `url`."""

    def make(url, **sections):
        prompts = write_prompts(tmp_path / "p.jsonl", 40)
        data = {"prompt_data": str(prompts), "input_key": "prompt", "label_key": "label"}
        algorithm = {"use_opd": True, "opd_type": "vllm", "opd_teacher_url": url}
        given = {
            "data": data,
            "algorithm": algorithm,
            "batch": {"prompts": 2, "samples_per_prompt": 2},
            "reward": {"rm_type": "math"},
            "rollout": {"max_response_len": 16, "max_prompt_len": 8},
        }
        return make_config(hf, **(given | sections))

    return make


def rollout(engine, cfg, evaluation=False):
    args = engine.args(cfg)
    return generate_rollout(args, 0, RolloutDataSourceWithBuffer(args), evaluation)


def answer(prompt, params):
    return ANSWER, 0.001


def test_each_token_of_the_response_gets_its_own_log_probability(config):
    with Server(faults=[503]) as teacher, FakeEngine(answer) as engine:
        output = rollout(engine, config(teacher.url + "/"))
    samples = [s for group in output.samples for s in group]
    for sample in samples:
        places = range(sample.prompt_length, len(sample.tokens))
        assert sample.teacher_log_probs == pytest.approx(
            [-(i + t / 1000) for i, t in zip(places, ANSWER, strict=True)]
        )
    assert (len(samples), len(teacher.asked)) == (4, 5)  # the 503 was retried


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (400, "failed .*teacher: .*/v1/completions refused.*400"),
        (200, "teacher: .*without the tokens' log-probabilities"),
    ],
    ids=["a refusal", "an answer without figures"],
)
def test_without_log_probabilities_a_sample_fails_and_names_the_teacher(config, status, said):
    with Server(faults=[status] * 99) as teacher, FakeEngine(answer) as engine:
        cfg = config(teacher.url)
        with pytest.raises(EngineError, match=said):
            rollout(engine, cfg)


def test_the_teachers_answers_for_surplus_groups_are_not_awaited(config):
    wanted = [ids_of(q) + ANSWER for q in ("q0", "q1")]
    with Server() as teacher, FakeEngine(answer) as engine:
        teacher.is_ready = lambda tokens: tokens in wanted and len(teacher.asked) == 40
        cfg = config(teacher.url, rollout={"max_response_len": 16, "over_sampling": 20})
        output = rollout(engine, cfg)
    assert [group[0].index for group in output.samples] == [0, 2]
    assert output.metrics["rollout/groups_surplus"] == 18
    assert len(teacher.asked) == 40


def test_an_evaluation_needs_no_teacher(config):
    with Server() as teacher, FakeEngine(answer) as engine:
        cfg = config(teacher.url)
        held = {"interval": 1, "prompt_data": ["held", cfg.data.prompt_data]}
        cfg = config(teacher.url, eval=held)
        output = rollout(engine, cfg, evaluation=True)
    assert len(output.data["held"]["samples"]) == 40
    assert teacher.asked == []


def test_the_server_is_checked_before_anything_starts(config):
    with Server() as teacher:
        cfg = config(teacher.url)
        name, own = f"--opd-teacher-url {teacher.url}", cfg.model.hf_checkpoint
        teacher.tokenize = lambda text: chat.encode(chat.load_tokenizer(own), [text])[0]
        assert check_teacher(cfg) == []
        teacher.tokenize, teacher.room = (lambda text: [1, 2]), 24
        assert check_teacher(cfg) == [
            f"{name} serves big, whose tokenizer differs from the tokenizer of --hf-checkpoint "
            f"{own}. Serve a teacher of the policy's family, so that token ids mean the same text.",
            f"{name} takes 24 tokens. A sample may have 24, and the server needs one more. Serve "
            "it with --max-model-len 25 or more, or lower --rollout-max-response-len.",
        ]
    (gone,) = check_teacher(cfg)
    assert gone.startswith(f"{name} does not answer like a vLLM server (ConnectionError: ")
    assert gone.endswith("Start it first (`vllm serve TEACHER`), or correct the address.")
    plan = dataclasses.replace(cfg, debug=dataclasses.replace(cfg.debug, dry_run=True))
    assert check_teacher(plan) == []


def finished(**changes) -> Sample:
    sample = Sample(index=4, group_index=0, tokens=[1, 2, 3, 4], response_length=3, reward=1.0)
    sample.status = Status.COMPLETED
    for name, value in changes.items():
        setattr(sample, name, value)
    return sample


def test_each_token_with_loss_needs_a_teacher_log_probability(config):
    cfg = config("http://a:1")
    taught = finished(teacher_log_probs=[-1.0, -2.0, -3.0])
    (sequence,) = build_train_batch([[taught]], cfg, 0).sequences
    assert sequence.teacher_logp.tolist() == [-1.0, -2.0, -3.0]
    hole = finished(teacher_log_probs=[-1.0, float("nan"), -3.0], loss_mask=[1, 0, 1])
    build_train_batch([[hole]], cfg, 0)
    hole.loss_mask = None
    for lacking in (hole, finished()):
        with pytest.raises(
            ValueError, match="sample 4 has no teacher_log_probs.*--opd-teacher-url"
        ):
            build_train_batch([[lacking]], cfg, 0)
    columns = {"tokens": [[1, 2, 3]], "response_lengths": [2], "rewards": [1.0]}
    (row,) = as_train_batch(columns | {"teacher_log_probs": [[-1.0, -2.0]]}, cfg, 0).sequences
    assert row.teacher_logp.tolist() == [-1.0, -2.0]
    start_over(taught)
    assert taught.teacher_log_probs is None

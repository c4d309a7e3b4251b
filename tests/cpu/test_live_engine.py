"""A running vLLM gets new weights, is paused, routed to and killed. The tests need this order."""

from __future__ import annotations

import json
import time
from http.client import HTTPConnection
from pathlib import Path

import pytest
import torch

from tests.cpu.tiny import make_config
from tests.unit.process_groups import group_members
from vime.backends.vllm.client import EngineClient
from vime.backends.vllm.router import Router
from vime.errors import EngineError
from vime.rollout.wire import PATH
from vime.weight_sync.sender import make_sender

TEMPERATURE = 0.7
PROMPT = [5, 17, 23, 42, 8, 61]


@pytest.fixture(params=["tied_engine", "untied_engine"], ids=["tied-shm", "latent-gloo"])
def live(request):
    return request.getfixturevalue(request.param)


def begin(url: str, num_tokens: int, **params) -> HTTPConnection:
    """A request that was sent; its answer is not read yet."""
    sampling = {"temperature": TEMPERATURE, "max_tokens": num_tokens, "ignore_eos": True}
    sampling |= {"logprobs": 0, "detokenize": False} | params
    body = json.dumps({"token_ids": PROMPT, "sampling_params": sampling})
    connection = HTTPConnection(url.removeprefix("http://"), timeout=120)
    connection.request("POST", PATH, body, {"Content-Type": "application/json"})
    return connection


def answer_to(request: HTTPConnection) -> dict:
    response = request.getresponse()
    text = response.read()
    request.close()
    assert response.status == 200, text
    return json.loads(text)["choices"][0]


def generate(url: str, num_tokens: int = 48, **params) -> dict:
    return answer_to(begin(url, num_tokens, **params))


def log_probs_of(choice: dict) -> torch.Tensor:
    return torch.tensor([entry["logprob"] for entry in choice["logprobs"]["content"]])


def hf_log_probs(model, choice: dict) -> torch.Tensor:
    """transformers' log-probabilities of the same tokens at the same temperature."""
    ids = choice["token_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + ids])).logits[0, len(PROMPT) - 1 : -1]
    logp = (logits / TEMPERATURE).log_softmax(-1)
    return logp.gather(-1, torch.tensor(ids)[:, None])[:, 0]


def new_weights(hf_dir: Path, seed: int):
    """The checkpoint's model with every weight changed, and the tensors that a trainer exports."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir).float().eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.03 * torch.randn_like(p))
    tied = model.config.tie_word_embeddings
    names = [n for n in model.state_dict() if not (tied and n == "lm_head.weight")]
    return model, [(n, model.state_dict()[n]) for n in names]


def spans_of(choice: dict) -> list[tuple[str, int, int]]:
    return [(s["version"], s["start"], s["end"]) for s in choice["weight_versions"]]


def sender_to(live):
    sender = make_sender(live.cfg, [EngineClient(live.url, timeout_s=60)], rank=0)
    sender.connect()
    return sender


def test_updated_engines_sample_from_the_new_weights(live):
    sender = sender_to(live)
    for version in (1, 2):
        model, weights = new_weights(live.hf_dir, seed=version)
        before = generate(live.url, seed=1)
        report = sender.send(iter(weights), version)
        after = generate(live.url, seed=1)
        stale = (log_probs_of(before) - hf_log_probs(model, before)).abs().max()
        assert stale > 0.01  # the update is what closes the gap
        torch.testing.assert_close(
            log_probs_of(after), hf_log_probs(model, after), atol=1e-4, rtol=0
        )
        assert spans_of(after) == [(str(version), 0, 48)]
        assert EngineClient(live.url).weight_versions() == [version]
        assert report.tensors == len(weights)
        assert report.buckets > 1
        assert report.seconds > 0
    sender.close()


def test_a_frozen_request_goes_on_under_the_new_weights(live):
    """Old tokens keep their version; new ones have log-probabilities of the new weights."""
    sender = sender_to(live)
    model, weights = new_weights(live.hf_dir, seed=11)
    request = begin(live.url, 400)
    generate(live.url, 8)  # began later: once it is answered, the long request has tokens too
    sender.send(iter(weights), 11)
    choice = answer_to(request)
    (_, start, switch), (version, _, end) = spans_of(choice)
    assert (start, version, end) == (0, "11", 400)
    assert 0 < switch < 400
    wanted = hf_log_probs(model, choice)
    torch.testing.assert_close(log_probs_of(choice)[switch:], wanted[switch:], atol=1e-4, rtol=0)
    sender.close()


def test_aborted_requests_come_back_with_their_tokens_and_log_probabilities(tied_engine):
    client = EngineClient(tied_engine.url)
    requests = [begin(tied_engine.url, 480) for _ in range(8)]
    generate(tied_engine.url, 8)  # began later: once it is answered, the others have tokens too
    client.abort_all()
    answers = [answer_to(request) for request in requests]
    assert [a["finish_reason"] for a in answers] == ["abort"] * 8
    for answer in answers:
        assert 0 < len(answer["token_ids"]) < 480
        assert len(log_probs_of(answer)) == len(answer["token_ids"])
    assert generate(tied_engine.url)["finish_reason"] == "length"  # it runs on


def test_a_bucket_that_cannot_be_read_leaves_a_working_engine(tied_engine):
    """The old weights stay, the version says that the update failed, and requests are answered."""
    sender = sender_to(tied_engine)
    model, weights = new_weights(tied_engine.hf_dir, seed=21)
    sender.send(iter(weights), 21)
    nonsense = [("model.layers.0.no_such_weight", torch.zeros(4))]
    with pytest.raises(EngineError, match="update_weights"):
        sender.send(iter(nonsense), 22)
    choice = generate(tied_engine.url)
    torch.testing.assert_close(log_probs_of(choice), hf_log_probs(model, choice), atol=1e-4, rtol=0)
    assert spans_of(choice)[0][0] == "-1"
    sender.send(iter(weights), 23)
    assert spans_of(generate(tied_engine.url))[0][0] == "23"


def test_an_update_that_leaves_out_a_tensor_is_refused(tied_engine):
    sender = sender_to(tied_engine)
    _, weights = new_weights(tied_engine.hf_dir, seed=31)
    without = [(n, t) for n, t in weights if n != "model.layers.1.input_layernorm.weight"]
    with pytest.raises(EngineError, match="finish_weight_update"):
        sender.send(iter(without), 31)
    sender.send(iter(weights), 32)


def test_an_idle_engine_leaves_the_cores_to_the_trainer(tied_engine):
    def cpu_s() -> float:
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[2]) == tied_engine.pgid:
                ticks += int(fields[11]) + int(fields[12])
        return ticks / 100

    time.sleep(0.5)
    began = cpu_s()
    time.sleep(2)
    assert cpu_s() - began < 0.4


def test_the_router_uses_all_engines_and_outlives_one(tied_engine, untied_engine, tmp_path):
    """The versions tell who answered. At the end the second engine dies with its killed owner."""
    for live, version in ((tied_engine, 101), (untied_engine, 202)):
        sender_to(live).send(iter(new_weights(live.hf_dir, seed=version)[1]), version)
    router = Router(make_config(tied_engine.hf_dir, log={"run_dir": str(tmp_path)}))
    url = router.start([tied_engine.url, untied_engine.url])
    try:
        served = [spans_of(generate(url, num_tokens=4))[0][0] for _ in range(8)]
        assert served.count("101") == served.count("202") == 4

        untied_engine.owner.kill()  # SIGKILL: no chance to clean up
        untied_engine.owner.wait()
        deadline = time.monotonic() + 60
        while group_members(untied_engine.pgid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert group_members(untied_engine.pgid) == []

        served = [spans_of(generate(url, num_tokens=4))[0][0] for _ in range(4)]
        assert served == ["101"] * 4
        router.check()
    finally:
        router.stop()

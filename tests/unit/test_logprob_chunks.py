"""--log-probs-chunk-size limits how many tokens have float32 logits at a time; no value changes."""

import pytest
import torch

from tests.unit.fake_engine import make_config
from vime.backends.megatron.training.logprobs import _Chunked, token_logprobs
from vime.config.sections.prompts import BatchConfig
from vime.errors import ConfigError


def test_the_chunk_limits_the_float32_copy_and_changes_no_value(monkeypatch):
    copied = []
    plain = _Chunked._scaled

    def scaled(self, logits):
        copied.append(len(logits))
        return plain(self, logits)

    monkeypatch.setattr(_Chunked, "_scaled", scaled)
    logits = torch.randn(10, 50, generator=torch.Generator().manual_seed(0))
    taken = torch.arange(10)
    found = {}
    for chunk, sizes in {None: [10, 10], 4: [4, 4, 2] * 2, 1: [1] * 20}.items():
        copied.clear()
        own = logits.clone().requires_grad_()
        out = token_logprobs(own, taken, chunk_tokens=chunk)
        (out.logp_T.sum() + out.entropy_T.square().sum()).backward()
        assert copied == sizes  # forward, then backward
        found[chunk] = torch.cat([out.logp_T.detach(), out.entropy_T.detach(), own.grad.flatten()])
    assert torch.equal(found[4], found[None])
    torch.testing.assert_close(found[1], found[None])
    dense = logits.log_softmax(-1)[torch.arange(10), taken]
    torch.testing.assert_close(found[4][:10], dense)


@pytest.mark.parametrize(("asked", "chunk"), [({}, None), ({"log_probs_chunk_asked": 512}, 512)])
def test_the_flag_sets_the_number_of_tokens(asked, chunk):
    assert make_config("none", batch={"prompts": 2, **asked}).batch.log_probs_chunk == chunk


@pytest.mark.parametrize("asked", [0, -2])
def test_a_chunk_of_no_tokens_is_refused(asked):
    with pytest.raises(ConfigError, match=f"--log-probs-chunk-size {asked} .*Give"):
        BatchConfig(prompts=2, log_probs_chunk_asked=asked)

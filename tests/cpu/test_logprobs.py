"""Log-probability, entropy and gradients of sharded logits, compared with the dense functions."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks

from vime.backends.megatron.training.logprobs import token_logprobs

TOKENS, VOCAB = 23, 96


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(TOKENS, VOCAB, generator=g)
    logits[:, -5:] = -1e30  # padded vocabulary
    taken = torch.randint(0, VOCAB - 5, (TOKENS,), generator=g)
    return logits, taken, torch.randn(TOKENS, generator=g), torch.randn(TOKENS, generator=g)


def dense(temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities, entropies, and the gradient of a sum of both, in float64."""
    logits, taken, a, b = problem()
    logits = logits.double().requires_grad_()
    logp = (logits / temperature).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    taken_logp = logp.gather(-1, taken[:, None])[:, 0]
    (a * taken_logp + b * entropy).sum().backward()
    return taken_logp.detach().float(), entropy.detach().float(), logits.grad.float()


def sharded(rank: int, world: int, port: int, temperature: float, chunk: int | None) -> tuple:
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", port, world, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    logits, taken, a, b = problem()
    mine = logits.chunk(world, -1)[rank].clone().requires_grad_()
    before = mine.detach().clone()
    out = token_logprobs(
        mine, taken, temperature=temperature, group=dist.group.WORLD, chunk_tokens=chunk
    )
    (a * out.logp_T + b * out.entropy_T).sum().backward()
    assert torch.equal(mine, before)
    return out.logp_T.detach(), out.entropy_T.detach(), mine.grad


@pytest.mark.parametrize(("temperature", "chunk"), [(0.7, 5), (1.0, None)])
def test_sharded_log_probabilities_and_entropy_equal_the_dense_ones(temperature, chunk):
    logp, entropy, gradient = dense(temperature)
    ranks = run_ranks(sharded, 2, temperature=temperature, chunk=chunk)
    for found_logp, found_entropy, _ in ranks:
        torch.testing.assert_close(found_logp, logp, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found_entropy, entropy, rtol=1e-5, atol=1e-5)
    found = torch.cat([g for _, _, g in ranks], -1)
    torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", ["logp", "entropy", "both"])
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_each_output_alone_has_its_own_gradient_whatever_the_chunk(wanted, chunk):
    logits, taken, a, b = problem()
    a, b = a * (wanted != "entropy"), b * (wanted != "logp")
    exact = logits.double().requires_grad_()
    logp = exact.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    (a * logp.gather(-1, taken[:, None])[:, 0] + b * entropy).sum().backward()
    mine = logits.clone().requires_grad_()
    out = token_logprobs(mine, taken, chunk_tokens=chunk)
    loss = 0.0
    if wanted != "entropy":
        loss = loss + (a * out.logp_T).sum()
    if wanted != "logp":
        loss = loss + (b * out.entropy_T).sum()
    loss.backward()
    torch.testing.assert_close(mine.grad, exact.grad.float(), rtol=1e-5, atol=1e-5)


def test_bfloat16_logits_are_computed_in_float32():
    logits, taken, _, _ = problem()
    coarse = logits.bfloat16().requires_grad_()
    out = token_logprobs(coarse, taken, temperature=0.5)
    expected = (coarse.detach().float() / 0.5).log_softmax(-1).gather(-1, taken[:, None])[:, 0]
    torch.testing.assert_close(out.logp_T, expected, rtol=1e-5, atol=1e-5)
    out.logp_T.sum().backward()
    assert coarse.grad.dtype == torch.bfloat16

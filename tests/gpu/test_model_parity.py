"""A tiny Qwen3 through the fused kernels against Hugging Face: logits and every gradient."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import make_config, write_tiny_hf
from training import named_gradients

LENGTHS = (200, 72, 72, 168)
VOCAB = 97
MEMORY = {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "mlp_act"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"hidden_size": 256, "intermediate_size": 320, "head_dim": 64, "tied": True}
    return write_tiny_hf(tmp_path_factory.mktemp("hf"), **shape)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of the pack, and the weight of each logit in the loss."""
    g = torch.Generator().manual_seed(5)
    total = sum(LENGTHS)
    tokens = torch.randint(0, VOCAB, (total,), generator=g)
    return tokens.cuda(), torch.randn(total, VOCAB, generator=g).cuda() / total


def ours(
    rank: int, world: int, port: int, folder: Path, dtype: str, parallel: dict
) -> dict[str, torch.Tensor]:
    from vime.backends.megatron.model.build import build_model
    from vime.backends.megatron.model.pack import make_pack
    from vime.backends.megatron.parallel import initialize_parallel
    from vime.backends.megatron.training.optimizer import wrap_for_training
    from vime.backends.megatron.weights.load import load_hf_weights

    model = {"hf_checkpoint": str(folder), "dtype": dtype}
    cfg = make_config(folder, model=model, parallel=parallel)
    initialize_parallel(cfg, rank, world, 0, "127.0.0.1", port)
    chunks = build_model(cfg)
    load_hf_weights(chunks, folder, cfg)
    chunks = wrap_for_training(cfg, chunks)
    tokens, weight = inputs()
    pack = make_pack([0, *accumulate(LENGTHS)], tokens.device)
    for _ in range(2):  # nothing of the first pass may remain in the second
        chunks[0].zero_grad_buffer()
        logits = chunks[0](tokens[None], tokens[None], None, packed_seq_params=pack)[0]
        (logits.float() * weight).sum().backward()
    found = named_gradients(SimpleNamespace(chunks=chunks, cfg=cfg))
    return {
        "logits": logits.detach().float().cpu(),
        **{k: v.float().cpu() for k, v in found.items()},
    }


def theirs(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).cuda()
    tokens, weight = inputs()
    logits = torch.cat([model(part[None]).logits[0] for part in tokens.split(LENGTHS)])
    (logits.float() * weight).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return {
        "logits": logits.detach().float().cpu(),
        **{k: v.float().cpu() for k, v in found.items()},
    }


def error(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """{tensor: norm of the difference, relative to the norm of the expected tensor}"""
    names = [name for name in expected if name in found]
    assert len(names) >= len(expected) - 1, "all but a tied output layer"
    return {n: float((found[n] - expected[n]).norm() / expected[n].norm()) for n in names}


def test_float32_logits_and_gradients_are_those_of_hugging_face(folder: Path) -> None:
    (found,) = run_ranks(ours, 1, folder=folder, dtype="float32", parallel={})
    errors = error(found, theirs(folder, torch.float32))
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize("parallel", [{}, MEMORY], ids=["", "recompute"])
def test_bfloat16_is_as_near_to_float32_as_hugging_face_is(folder: Path, parallel: dict) -> None:
    exact = theirs(folder, torch.float32)
    (found,) = run_ranks(ours, 1, folder=folder, dtype="bfloat16", parallel=parallel)
    mine, other = error(found, exact), error(theirs(folder, torch.bfloat16), exact)
    worse = {
        name: (mine[name], other[name]) for name in mine if mine[name] > 1.5 * other[name] + 2e-3
    }
    assert not worse, worse

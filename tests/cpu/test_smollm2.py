"""A real model, SmolLM2-135M-Instruct, in float32: the logits of Hugging Face, the bytes back."""

from __future__ import annotations

import filecmp
import os
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny import make_config
from training import hf_model

FOLDER = os.environ.get("VIME_SMOLLM2", "")
QUESTION = "What is 7 + 5?"


def convert(rank: int, world: int, port: int, folder: Path, out: Path, tokens: list[int]) -> float:
    """HF to torch_dist to HF; the largest difference of a logit from HF's in OUT/logits.pt."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from vime.backends.megatron.checkpoints.load import load_checkpoint
    from vime.backends.megatron.checkpoints.save import save_checkpoint
    from vime.backends.megatron.checkpoints.start import resolve
    from vime.backends.megatron.model.build import build_model
    from vime.backends.megatron.parallel import initialize_parallel
    from vime.backends.megatron.weights.folder import save_hf
    from vime.backends.megatron.weights.load import load_hf_weights

    cfg = make_config(folder)
    initialize_parallel(cfg, rank, world)
    chunks = build_model(cfg)
    load_hf_weights(chunks, folder, cfg)
    save_checkpoint(cfg, out / "megatron", None, chunks)
    again = build_model(cfg)
    load_checkpoint(cfg, resolve(str(out / "megatron")), again)
    save_hf(again, cfg, out / "back")
    ids = torch.tensor([tokens])
    with torch.no_grad():
        starts, length = torch.tensor([0, ids.shape[1]], dtype=torch.int32), ids.shape[1]
        pack = PackedSeqParams("thd", starts, starts, max_seqlen_q=length, max_seqlen_kv=length)
        found = again[0](ids, torch.zeros_like(ids), None, packed_seq_params=pack)
        return float((found - torch.load(out / "logits.pt")).abs().max())


@pytest.mark.skipif(not FOLDER, reason="VIME_SMOLLM2 names no HF folder of SmolLM2-135M-Instruct")
def test_a_real_model_converts_computes_and_comes_back(tmp_path: Path) -> None:
    import transformers

    tokens = transformers.AutoTokenizer.from_pretrained(FOLDER)(QUESTION).input_ids
    with torch.no_grad():
        torch.save(hf_model(FOLDER)(torch.tensor([tokens])).logits, tmp_path / "logits.pt")
    (off,) = run_ranks(convert, 1, folder=Path(FOLDER), out=tmp_path, tokens=tokens)
    assert off < 1e-3
    for name in ("model.safetensors", "config.json"):
        assert filecmp.cmp(Path(FOLDER, name), tmp_path / "back" / name, shallow=False)

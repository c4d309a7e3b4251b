"""The converters as a user calls them: there and back, and their refusals."""

from __future__ import annotations

import filecmp
import subprocess
import sys
from pathlib import Path

from tiny import write_tiny_hf

ROOT = Path(__file__).parents[2]
TO_MEGATRON = ROOT / "tools" / "convert_hf_to_torch_dist.py"
TO_HF = ROOT / "tools" / "convert_torch_dist_to_hf.py"
MODEL_ARGS = [
    *("--num-layers", "4", "--hidden-size", "64", "--ffn-hidden-size", "128"),
    *("--num-attention-heads", "4", "--group-query-attention", "--num-query-groups", "2"),
    *("--kv-channels", "16", "--qk-layernorm", "--swiglu", "--disable-bias-linear"),
    *("--normalization", "RMSNorm", "--norm-epsilon", "1e-6", "--vocab-size", "97"),
    *("--use-rotary-position-embeddings", "--rotary-base", "1000000"),
]


def run(*words: object) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=240, cwd=ROOT)


def test_there_and_back_gives_the_same_file(tmp_path: Path) -> None:
    """Two tensor parallel ranks convert; one process converts their shards and padding back."""
    source = write_tiny_hf(tmp_path / "hf", tied=True, dtype="bfloat16")
    made, back = tmp_path / "megatron", tmp_path / "back"
    two_ranks = ("-m", "torch.distributed.run", "--nproc-per-node", "2", TO_MEGATRON)
    flags = (*MODEL_ARGS, "--tensor-model-parallel-size", "2")
    there = run(*two_ranks, *flags, "--hf-checkpoint", source, "--save", made)
    assert there.returncode == 0, there.stderr
    assert (made / "latest_checkpointed_iteration.txt").read_text() == "release"
    paths = ("--input-dir", made, "--output-dir", back, "--origin-hf-dir", source)
    home = run(TO_HF, *paths)
    assert home.returncode == 0, home.stderr
    for name in ("model.safetensors", "config.json"):
        assert filecmp.cmp(source / name, back / name, shallow=False)

    again = run(TO_HF, *paths)
    assert again.returncode == 2
    assert "add -f" in again.stderr


def test_the_converter_refuses_bad_input_before_it_starts(tmp_path: Path) -> None:
    source = write_tiny_hf(tmp_path / "hf", tied=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("20")
    wrong = [*MODEL_ARGS, "--rotary-base", "10000", "--tensor-model-parallel-size", "2"]
    refused = run(TO_MEGATRON, *wrong, "--hf-checkpoint", source, "--save", tmp_path / "run")
    assert refused.returncode == 2
    for part in ("--rotary-base 10000", "1000000", "torchrun", "checkpoints of a training run"):
        assert part in refused.stderr
    (source / "model.safetensors").unlink()
    refused = run(TO_MEGATRON, "--hf-checkpoint", source, "--save", tmp_path / "new")
    assert refused.returncode == 2
    assert "safetensors" in refused.stderr

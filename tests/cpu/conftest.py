"""Live engines, started once for all tests that use them: a start takes 15 to 40 s on 2 cores."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAD_DIM = 32  # the smallest that vLLM's attention takes on CPU


@dataclass(slots=True)
class LiveEngine:
    """A running server and the tiny model that it started from."""

    url: str
    hf_dir: Path
    pgid: int  # the process group of the server
    cfg: object
    owner: subprocess.Popen | None = None


@pytest.fixture(scope="session")
def tied_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3 in HF format, whose output layer is tied to its embedding."""
    from tests.cpu.tiny import write_tiny_hf

    return write_tiny_hf(tmp_path_factory.mktemp("tied"), tied=True, head_dim=HEAD_DIM)


@pytest.fixture(scope="session")
def untied_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Moonlight with dense layers, latent attention and an untied output layer."""
    from scripts.quickstart.model import make_tokenizer
    from tests.cpu.live_families import shape_for_engine
    from tests.cpu.model_families import make_model

    folder, shape = tmp_path_factory.mktemp("untied"), shape_for_engine("Moonlight")
    shape |= {"first_k_dense_replace": 2, "max_position_embeddings": 512}
    make_model(folder, "Moonlight", **shape)
    make_tokenizer().save_pretrained(folder)  # vLLM refuses a folder without one
    return folder


@pytest.fixture(scope="session")
def quickstart_assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the quickstart's untrained `model` and its .jsonl files."""
    from scripts.quickstart.data import write_data
    from scripts.quickstart.model import write_checkpoint

    folder = tmp_path_factory.mktemp("quickstart")
    write_data(folder, seed=0)
    write_checkpoint(folder / "model", seed=0)
    return folder


@pytest.fixture(scope="session")
def tied_engine(tied_checkpoint: Path, tmp_path_factory) -> Iterator[LiveEngine]:
    """Colocated: weights arrive over shared memory."""
    pytest.importorskip("vllm", reason="needs vLLM")
    from tests.cpu.tiny import make_config
    from vime.backends.vllm.engine import VLLMEngine

    cfg = make_config(
        tied_checkpoint,
        cluster={"actor_gpus_per_node": 1, "colocate": True},
        log={"run_dir": str(tmp_path_factory.mktemp("run"))},
        engine={"update_weight_buffer_size": 100_000, "check_weight_update_equal": True},
    )
    engine = VLLMEngine(cfg, 0, [0])
    url = engine.start()
    try:
        yield LiveEngine(url, tied_checkpoint, engine.process.guard.pid, cfg)
    finally:
        engine.stop()


@pytest.fixture(scope="session")
def untied_engine(untied_checkpoint: Path, tmp_path_factory) -> Iterator[LiveEngine]:
    """Decoupled: weights arrive over gloo. Its owner is a process that a test can kill."""
    pytest.importorskip("vllm", reason="needs vLLM")
    from tests.cpu.tiny import make_config

    run_dir = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-m", "tests.cpu.own_engine", str(untied_checkpoint), str(run_dir)]
    owner = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        url, pgid = owner.stdout.readline().split()
        cfg = make_config(untied_checkpoint, engine={"update_weight_buffer_size": 100_000})
        yield LiveEngine(url, untied_checkpoint, int(pgid), cfg, owner)
    finally:
        owner.kill()
        owner.wait()

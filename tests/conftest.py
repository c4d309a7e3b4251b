"""Options and fixtures for all tests: hiding the heavy libraries, skipping tests without GPUs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HEAVY = ("ray", "megatron", "vllm", "vllm_router")
TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS.parent))  # train.py, tools/, scripts/ and benchmarks/ are importable


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--hide-stack",
        action="store_true",
        help="make Ray, Megatron and vLLM unimportable, as on a machine that lacks them",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu(count=1): needs that many CUDA devices; else skipped")
    if config.getoption("--hide-stack"):
        for name in HEAVY:
            sys.modules[name] = None  # type: ignore[assignment]  # `import name` now fails


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds only a tokenizer, with one token per character."""
    from tests.unit.fake_engine import write_tokenizer

    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests that need more GPUs than this machine has. All of tests/gpu need at least one."""
    for item in items:
        if TESTS / "gpu" in item.path.parents and item.get_closest_marker("gpu") is None:
            item.add_marker(pytest.mark.gpu(1))
    asking = [item for item in items if item.get_closest_marker("gpu")]
    if not asking:
        return
    import torch

    present = torch.cuda.device_count()
    for item in asking:
        marker = item.get_closest_marker("gpu")
        wanted = marker.args[0] if marker.args else marker.kwargs.get("count", 1)
        if present < wanted:
            reason = f"needs {wanted} CUDA device(s), this machine has {present}"
            item.add_marker(pytest.mark.skip(reason=reason))

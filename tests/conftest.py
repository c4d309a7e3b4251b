"""Options and fixtures for all tests: hiding the heavy libraries, skipping tests without GPUs.

`make test` runs tests/unit with --hide-stack, then everything with --stack-only: of tests/unit
only the tests marked `stack`, because no other one imports Ray, Megatron or vLLM.
"""

from __future__ import annotations

import builtins
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HEAVY = ("ray", "megatron", "vllm", "vllm_router")
OURS = ("vime", "tests", "_pytest")  # _pytest: pytest.importorskip
TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS.parent))  # train.py, tools/, scripts/ and benchmarks/ are importable

asked: list[str] = []  # heavy modules that the current test tried to import, with --hide-stack


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--hide-stack",
        action="store_true",
        help="make Ray, Megatron and vLLM unimportable, as on a machine that lacks them",
    )
    parser.addoption(
        "--stack-only",
        action="store_true",
        help="of tests/unit, run only the tests that import Ray, Megatron or vLLM",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu(count=1): needs that many CUDA devices; else skipped")
    config.addinivalue_line("markers", "stack: a unit test that imports Ray, Megatron or vLLM")
    if config.getoption("--hide-stack"):
        for name in HEAVY:
            sys.modules[name] = None  # type: ignore[assignment]  # `import name` now fails
        builtins.__import__ = watching(builtins.__import__)


def watching(plain: Any) -> Any:
    """`__import__` that also notes the heavy modules that vime and its tests ask for."""

    def __import__(name: str, importer: Any = None, *args: Any, **kw: Any) -> Any:
        if name.split(".")[0] in HEAVY:
            by = (importer or {}).get("__name__", "")
            if by.split(".")[0] in OURS:
                asked.append(name)
        return plain(name, importer, *args, **kw)

    return __import__


@pytest.fixture(autouse=True)
def stack_is_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that imports the stack needs its mark, or --stack-only would leave it out."""
    asked.clear()
    yield
    if asked and not request.node.get_closest_marker("stack"):
        pytest.fail(f"imports {asked[0]}: add @pytest.mark.stack", pytrace=False)


@pytest.fixture(autouse=True)
def environment_stays() -> Iterator[None]:
    """Some libraries set variables when they are imported, such as TRL the log level of vLLM.

    The processes that later tests start must not inherit them.
    """
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds only a tokenizer, with one token per character."""
    from tests.unit.fake_engine import write_tokenizer

    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Applies --stack-only, and skips tests that need more GPUs than this machine has.

    All tests in tests/gpu need at least one GPU.
    """
    if config.getoption("--stack-only"):
        left_out = [
            item
            for item in items
            if TESTS / "unit" in item.path.parents and not item.get_closest_marker("stack")
        ]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
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

"""Runs one function on several ranks, each a fresh process, and brings back what each returned.

    results = run_ranks(my_case, 2, tp=2)      # my_case(rank, world_size, port, tp=2)

The function lives at the top level of a module; arguments and results are pickled. A rank that
fails or hangs ends the others (only processes started here) and raises with the ranks' output.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ENV = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "GLOO_SOCKET_IFNAME": "lo"}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def agree_on_port(folder: str | Path, name: str, rank: int, timeout_s: float = 60.0) -> int:
    """A port that is free now, the same on every rank: rank 0 leaves it in a file of `folder`."""
    note = Path(folder, f"port of {name}")
    if rank == 0:
        partial = note.with_suffix(".partial")
        partial.write_text(str(free_port()))
        partial.rename(note)
    deadline = time.monotonic() + timeout_s
    while not note.exists():
        assert time.monotonic() < deadline, f"rank 0 named no port for {name} in {timeout_s} s"
        time.sleep(0.01)
    return int(note.read_text())


def run_ranks(
    fn: Callable[..., Any], num_ranks: int, *, timeout_s: float = 240.0, **kwargs: Any
) -> list[Any]:
    """[what `fn(rank, world_size, port, **kwargs)` returned, by rank]. Raises AssertionError."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="vime-ranks-") as tmp:
        call = Path(tmp, "call.pkl")
        call.write_bytes(pickle.dumps((fn.__code__.co_filename, fn.__name__, kwargs)))
        logs = [Path(tmp, f"{rank}.log") for rank in range(num_ranks)]
        processes = []
        for rank, log in enumerate(logs):
            with log.open("wb") as out:
                argv = [sys.executable, __file__, str(call), str(rank), str(num_ranks), str(port)]
                env = {**os.environ, **_ENV}
                processes.append(
                    subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT, env=env)
                )
        try:
            _wait(processes, time.monotonic() + timeout_s)
        except RuntimeError as error:
            output = "\n".join(f"--- rank {i}\n{p.read_text()[-6000:]}" for i, p in enumerate(logs))
            raise AssertionError(f"{fn.__name__} on {num_ranks} ranks: {error}\n{output}") from None
        return [pickle.loads(Path(tmp, f"{rank}.out").read_bytes()) for rank in range(num_ranks)]


def _wait(processes: list[subprocess.Popen], deadline: float) -> None:
    try:
        while True:
            codes = [p.poll() for p in processes]
            if any(codes):
                raise RuntimeError(f"exit codes {codes}")
            if all(code == 0 for code in codes):
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"no end before the deadline; exit codes {codes}")
            time.sleep(0.02)
    finally:
        for p in processes:
            if p.poll() is None:
                p.kill()
            p.wait()


def _child(call: str, rank: str, num_ranks: str, port: str) -> None:
    filename, name, kwargs = pickle.loads(Path(call).read_bytes())
    sys.path.insert(0, str(Path(filename).parent))
    spec = importlib.util.spec_from_file_location(Path(filename).stem, filename)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    result = getattr(module, name)(int(rank), int(num_ranks), int(port), **kwargs)
    Path(call).with_name(f"{rank}.out").write_bytes(pickle.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # process groups may outlive the case; nobody needs an orderly end here


if __name__ == "__main__":
    _child(*sys.argv[1:])

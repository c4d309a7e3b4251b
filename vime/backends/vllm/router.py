"""vllm-router: one address for rollouts, in front of all engines."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

from vime.addresses import (
    LOOPBACK,
    HeldPort,
    bracketed,
    host_and_port,
    is_unspecified,
    listening,
    url_of,
)
from vime.backends.vllm import local_http
from vime.backends.vllm.engine import logs_dir
from vime.backends.vllm.process import GuardedProcess
from vime.backends.vllm.spelling import words_of
from vime.config import Config
from vime.errors import EngineError

START_TIMEOUT_S = 60.0


class Router:
    """Balances generation requests. Control calls bypass it, because it would pick one engine.

    host  this node's address. The router listens on it, unless --vllm-router-ip gives another
    """

    def __init__(self, cfg: Config, *, host: str = LOOPBACK) -> None:
        self.cfg = cfg
        self.host = (cfg.engine.router_ip or host).strip("[]")
        # Of a router on all addresses ("0.0.0.0", "::"), clients need one that they can reach.
        self.reached_at = host if is_unspecified(self.host) else self.host
        self.log: Path = logs_dir(cfg) / "router.log"
        self.process: GuardedProcess | None = None
        self.ports: list[HeldPort] = []
        self.url = ""

    def start(self, engine_urls: list[str]) -> str:
        """Start the router and wait until it is healthy. Returns its URL; raises EngineError."""
        engine = self.cfg.engine
        host = self.host
        if engine.router_port and listening(host, engine.router_port):
            raise EngineError(
                f"--vllm-router-port {engine.router_port}: another program listens there. Give a "
                "free port, or leave the flag out."
            )
        port, metrics_port = self._hold_ports()
        argv = [sys.executable, "-m", "vllm_router.launch_router"]
        argv += ["--host", host, "--port", str(port), "--worker-urls", *engine_urls]
        argv += ["--policy", self.cfg.router_policy]
        argv += ["--prometheus-host", LOOPBACK, "--prometheus-port", str(metrics_port)]
        argv += ["--request-timeout-secs", str(int(engine.request_timeout_s))]
        argv += ["--max-concurrent-requests", str(self._requests_in_flight(len(engine_urls)))]
        argv += ["--health-check-interval-secs", "10", "--worker-startup-check-interval", "1"]
        argv += ["--log-level", "warning"]
        for name, value in engine.router_args.items():  # the user's flags come last and win
            argv += words_of(name, value)
        engine_hosts = [host_and_port(url)[0] for url in engine_urls]
        env = local_http.without_proxies(os.environ, self.reached_at, *engine_hosts)
        self.process = GuardedProcess("vllm-router", argv, env, self.log)
        self.url = url_of(self.reached_at, port)
        process = self.process
        process.wait_until(
            lambda: process.serves(host, port) and local_http.healthy(self.url, timeout_s=2.0),
            START_TIMEOUT_S,
        )
        return self.url

    def _hold_ports(self) -> tuple[int, int]:
        """The ports of the router and of its metrics."""
        try:
            self.ports = [HeldPort(self.host, self.cfg.engine.router_port or 0), HeldPort()]
        except OSError as error:
            raise EngineError(
                f"the router cannot listen on {self.host} of {socket.gethostname()}: {error}. "
                "--vllm-router-ip takes an address of the machine of the router."
            ) from None
        return self.ports[0].port, self.ports[1].port

    def _requests_in_flight(self, num_engines: int) -> int:
        return max(256, 2 * self.cfg.rollout.concurrency * num_engines)

    def check(self) -> None:
        """Raises EngineError, with the end of the log, if the router died."""
        if self.process is not None:
            self.process.check()

    def stop(self) -> None:
        if self.process is not None:
            self.process.stop()
            self.process = None
        for port in self.ports:
            port.close()


def address_in_args(url: str) -> dict[str, Any]:
    """The router's address as users' functions find it in `args`.

    An IPv6 address has brackets: f"http://{args.vllm_router_ip}:{args.vllm_router_port}" is a URL.
    """
    host, port = host_and_port(url)
    return {"vllm_router_ip": bracketed(host), "vllm_router_port": port}

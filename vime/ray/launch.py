"""Start a run from its configuration, and stop all its processes at the end.

Ray is imported when a run starts, not earlier, so `--help` and the refusal of a flag stay fast.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vime.config import Config
from vime.config.secrets import without_secrets
from vime.config.view import resolved
from vime.errors import ConfigError
from vime.platform import LONGEST_SOCKET_PATH, current
from vime.ray.slots import joins_cluster, local_slots

if TYPE_CHECKING:
    from vime.observe import RunLog
    from vime.ray.run import Run


@contextmanager
def launch(cfg: Config) -> Iterator[Run]:
    """Start Ray (or join the cluster of RAY_ADDRESS), trainer and engines. Stop them at the end.

    SIGTERM ends a run as Ctrl-C does, so no process is left behind when a scheduler stops the run.
    Raises ConfigError if the cluster has no room for the run, or if a node cannot take part.
    """
    from vime.observe import RunLog

    flags = without_secrets(resolved(cfg))
    with RunLog(cfg.log, fallback_dir=cfg.checkpoint.save, config=flags) as log, _ray(cfg):
        from vime.ray.placement_group import reserve
        from vime.ray.run import Run

        cfg = _decided(cfg, log)
        run = Run(cfg, reserve(cfg), log)
        try:
            yield run
        except BaseException:
            # A signal to the whole process group may have ended the actors and engines already.
            with suppress(Exception):
                run.stop()
            raise
        run.stop()


def _decided(cfg: Config, log: RunLog) -> Config:
    """The configuration with the decisions that the driver makes for all processes."""
    return replace(
        cfg,
        cluster=replace(cfg.cluster, device=current().device_type),
        # Processes on other nodes do not share the driver's current folder.
        log=replace(cfg.log, run_dir=str(log.run_dir.absolute())),
    )


@contextmanager
def _ray(cfg: Config) -> Iterator[None]:
    import ray

    from vime.ray import cluster

    if joins_cluster():
        cluster.join(cfg.cluster.working_dir, cfg.cluster.device)
    else:
        _start_ray(cfg)
    signal.signal(signal.SIGTERM, _interrupt)  # after ray.init, which sets its own handler
    try:
        yield
    finally:
        ray.shutdown()


def _start_ray(cfg: Config) -> None:
    """Start a Ray of our own, even if another cluster runs on this machine."""
    import ray

    from vime.ray.cluster import with_code

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    keep_socket_paths_short()
    options: dict[str, Any] = {"runtime_env": with_code(cfg.cluster.working_dir)}
    if not current().is_cuda:
        options["num_cpus"] = local_slots(cfg.cluster)
    ray.init(address="local", include_dashboard=False, logging_level="ERROR", **options)


def keep_socket_paths_short() -> None:
    """Choose /tmp for Ray's sockets if TMPDIR is too long for them.

    Raises ConfigError if RAY_TMPDIR, which the user chose for Ray, is too long.
    """
    chosen = os.environ.get("RAY_TMPDIR")
    folder = chosen or os.environ.get("TMPDIR") or "/tmp"
    if len(os.fsencode(folder)) + len(_RAY_SOCKET) <= LONGEST_SOCKET_PATH:
        return
    if chosen:
        raise ConfigError(
            f"RAY_TMPDIR {chosen} is too long: Ray's sockets lie in it, and Linux allows paths of "
            f"{LONGEST_SOCKET_PATH} bytes. Choose a folder of at most "
            f"{LONGEST_SOCKET_PATH - len(_RAY_SOCKET)} bytes, or unset it."
        )
    os.environ["RAY_TMPDIR"] = "/tmp"
    print(f"note: TMPDIR {folder} is too long for Ray's sockets; Ray uses /tmp.", file=sys.stderr)


# The longest socket path that Ray adds to its temporary folder.
_RAY_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def run_or_exit(loop: Callable[[Config], None], cfg: Config) -> None:
    """Run a loop. An error that the user can act on becomes a message and an exit code.

    The code is 2 for a setting that cannot work and 130 for an interrupt. Other errors are raised.
    """
    try:
        loop(cfg)
    except ConfigError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: every process of this run has been stopped", file=sys.stderr)
        sys.exit(130)

"""TensorBoard and Weights & Biases: they get the metrics if the flags ask for it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from vime.errors import ConfigError


class Tracker(Protocol):
    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files for `tensorboard --logdir FOLDER`."""

    def __init__(self, folder: str | Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(folder))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run. It logs `step` as its own axis: wandb's counter must start at 0."""

    def __init__(
        self,
        folder: str | Path,
        project: str | None,
        group: str | None,
        config: Mapping[str, Any] | None,
    ) -> None:
        import wandb

        self._run = wandb.init(
            project=project or "vime", group=group, dir=str(folder), config=dict(config or {})
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def close(self) -> None:
        self._run.finish()


def make_trackers(
    run_dir: str | Path,
    *,
    use_tensorboard: bool = False,
    tb_dir: str | Path | None = None,
    use_wandb: bool = False,
    wandb_project: str | None = None,
    wandb_group: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> list[Tracker]:
    """The trackers that the flags ask for. Raises ConfigError when a package is missing."""
    problems = missing_packages(use_tensorboard=use_tensorboard, use_wandb=use_wandb)
    if problems:
        raise ConfigError(*problems)
    trackers: list[Tracker] = []
    if use_tensorboard:
        trackers.append(TensorBoard(tb_dir or Path(run_dir) / "tensorboard"))
    if use_wandb:
        trackers.append(WandB(run_dir, wandb_project, wandb_group, config))
    return trackers


def missing_packages(*, use_tensorboard: bool, use_wandb: bool) -> list[str]:
    """A problem for each tracker whose package is missing, for the checks before a run."""
    wanted = {"tensorboard": use_tensorboard, "wandb": use_wandb}
    return [
        f"--use-{package} needs the package {package}, which is not installed. "
        f"Install it (pip install {package}) or leave the flag out."
        for package, asked in wanted.items()
        if asked and importlib.util.find_spec(package) is None
    ]

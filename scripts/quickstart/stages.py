"""Runs stages. A finished stage is skipped unless its inputs have changed."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from vime.files import write_text


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the quickstart.

    name     a short name, also for the stamp file
    words    title on the terminal
    work     runs the stage
    outputs  files and folders that the stage makes; deleted before it, required after it
    inputs   texts that determine the outcome, such as settings and sources
    """

    name: str
    words: str
    work: Callable[[], None]
    outputs: tuple[Path, ...]
    inputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Done:
    stage: Stage
    seconds: float  # of this run, or of the earlier run if reused
    reused: bool


def run_stages(stages: Iterable[Stage], stamps: Path, tell: Callable[[str], None]) -> list[Done]:
    """Run the stages in order.

    A stage's key includes the keys before it, so a change repeats all later stages. The stamp is
    written after a stage succeeded, so an interrupted stage is repeated.
    """
    stamps.mkdir(parents=True, exist_ok=True)
    stages = list(stages)
    done: list[Done] = []
    key = ""
    for number, stage in enumerate(stages, start=1):
        key = hashlib.sha256("\0".join((key, stage.name, *stage.inputs)).encode()).hexdigest()
        stamp = stamps / f"{stage.name}.json"
        title = f"{number}/{len(stages)} {stage.words}"
        seconds = seconds_if_done(stage, stamp, key)
        if seconds is not None:
            tell(f"{title}: done before ({seconds:.0f} s)")
            done.append(Done(stage, seconds, reused=True))
            continue
        tell(title)
        stamp.unlink(missing_ok=True)
        for path in stage.outputs:
            delete(path)
        started = time.monotonic()
        stage.work()
        seconds = time.monotonic() - started
        missing = [str(path) for path in stage.outputs if not path.exists()]
        if missing:
            raise FileNotFoundError(f"stage {stage.name} ended without making {', '.join(missing)}")
        write_text(stamp, json.dumps({"key": key, "seconds": seconds}) + "\n")
        done.append(Done(stage, seconds, reused=False))
    return done


def seconds_if_done(stage: Stage, stamp: Path, key: str) -> float | None:
    """How long the stage took, if its stamp has this key and its outputs exist; otherwise None."""
    if not stamp.exists() or not all(path.exists() for path in stage.outputs):
        return None
    try:
        record = json.loads(stamp.read_text())
    except json.JSONDecodeError:
        return None
    return float(record["seconds"]) if record.get("key") == key else None


def delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

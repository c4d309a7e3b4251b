"""The kinds of failure of a sample. One odd input fails its sample, not the run.

A failed sample has a status, a kind and a reason. It is not trained on, and it is counted by its
kind. The run ends when every sample fails. A PluginError ends the run at once, because every call
of the hook would repeat it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum

from vime.errors import EngineError, PluginError
from vime.types import Sample, Status

logger = logging.getLogger(__name__)


class Failure(StrEnum):
    """The kind of a failure. `Sample.failure` is "KIND: REASON"."""

    REQUEST = "request failed"
    GENERATION = "generation failed"
    GENERATION_TIMEOUT = "generation timeout"
    GRADING = "grading failed"
    GRADING_TIMEOUT = "grading timeout"
    TEACHER = "teacher"
    HOOK = "sample hook failed"
    OTHER = "other"  # the user's own function set the status

    @property
    def metric(self) -> str:
        return f"rollout/failed/{self.replace(' ', '_')}"


def fail(sample: Sample, kind: Failure, reason: object) -> None:
    sample.status, sample.failure = Status.FAILED, f"{kind}: {reason}"


def kind_of(sample: Sample) -> Failure | None:
    """The kind of a sample's failure; None if the sample did not fail."""
    if sample.status is not Status.FAILED:
        return None
    kind = (sample.failure or "").partition(":")[0]
    return Failure(kind) if kind in set(Failure) else Failure.OTHER


@contextmanager
def failing(samples: Sequence[Sample], kind: Failure, who: str) -> Iterator[None]:
    """A block for the user's code: an error in it fails the samples and ends the block.

    The log shows the first traceback of each kind of error. PluginError and EngineError are raised.
    """
    try:
        yield
    except (PluginError, EngineError):
        raise
    except Exception as error:
        reason = f"{who} raised {type(error).__name__}: {error}"[:500]
        if (told := (who, type(error))) not in _told:
            _told.add(told)
            logger.warning("%s, so its sample fails", reason, exc_info=error)
        for sample in samples:
            fail(sample, kind, reason)


_told: set[tuple[str, type[Exception]]] = set()

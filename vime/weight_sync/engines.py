"""The calls that take every engine through one weight update, besides the weights themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from vime.errors import EngineError
from vime.weight_sync.together import call_each

BROKEN = -1  # the version of an engine whose update failed half-way


class Engines:
    """Rank 0 calls `freeze`, `finish`, `acknowledge`, `resume`; after errors `abandon`, `resume`.

    asleep           the engines' KV caches sleep during the update. vLLM schedules no request until
                     they wake up, so no pause is needed, and a resume would come too early
    check_checksums  --check-weight-update-equal
    keep_kv          running requests keep the keys and values that older weights made
    """

    def __init__(
        self,
        clients: list[Any],
        timeout_s: float,
        *,
        asleep: bool,
        check_checksums: bool,
        keep_kv: bool = False,
    ) -> None:
        self.clients = clients
        self.timeout_s = timeout_s
        self.asleep = asleep
        self.check_checksums = check_checksums
        self.keep_kv = keep_kv

    def freeze(self) -> None:
        """Requests stop where they are, and the engines expect new weights."""
        if not self.asleep:
            self._each(lambda c: c.pause("keep"), "pause")
        if self.check_checksums:
            self._each(lambda c: c.record_checksums(), "checksums")
        self._each(lambda c: c.start_weight_update(), "start of the weight update")

    def finish(self) -> None:
        self._each(lambda c: c.finish_weight_update(), "end of the weight update")

    def acknowledge(self, version: int, checksums: dict[str, str]) -> None:
        """Unless `keep_kv`, forget the keys and values of the old weights. Set the version.

        Raises EngineError unless every worker of every engine confirms the version and, if
        checksums are checked, reports the same checksums.
        """

        def stamp(client: Any) -> None:
            if not self.keep_kv:
                client.reset_prefix_cache()
            held = client.set_weight_version(version)
            if not held or any(v != version for v in held):
                raise EngineError(
                    f"engine {client.url} holds weight versions {held} after an update to {version}"
                )
            if self.check_checksums:
                for worker, received in enumerate(client.checksums()):
                    compare(f"worker {worker} of engine {client.url}", checksums, received)

        self._each(stamp, "acknowledgement of the weight version")

    def abandon(self) -> None:
        """After a failure: end the update, so that engines can run, and mark them as broken."""

        def end(client: Any) -> None:
            with contextlib.suppress(EngineError):  # refused if the engine has ended the update
                client.finish_weight_update()
            with contextlib.suppress(EngineError):
                client.set_weight_version(BROKEN)

        with contextlib.suppress(EngineError):
            self._each(end, "clean-up after a failed weight update")

    def resume(self) -> None:
        """Call this after a failure too: requests to an engine that stays paused would hang."""
        if self.asleep:
            return

        def resume(client: Any) -> EngineError | None:
            try:
                client.resume()
            except EngineError as error:
                return error
            return None

        errors = [e for e in self._each(resume, "resume") if e is not None]
        if errors:
            raise errors[0]

    def _each(self, call: Callable[[Any], Any], what: str) -> list[Any]:
        return call_each(self.clients, call, self.timeout_s, what)


def compare(who: str, sent: dict[str, str], received: dict[str, str]) -> None:
    """{tensor: checksum} of both sides. Raises EngineError with the tensors that differ."""
    wrong = sorted(n for n in sent.keys() | received.keys() if sent.get(n) != received.get(n))
    if wrong:
        raise EngineError(
            f"--check-weight-update-equal: {who} received wrong bytes for {len(wrong)} of "
            f"{len(sent)} tensors, among them {', '.join(wrong[:4])}"
        )

"""Control calls to one engine. They bypass the router, which would choose an engine itself."""

from __future__ import annotations

from typing import Any

import requests

from vime.backends.vllm import local_http
from vime.backends.vllm.dialect import dialect_of, installed_version
from vime.errors import EngineError

QUICK_S = 60.0
UNKNOWN_RELEASE = "0.32"  # assumed where the caller has no vLLM installed


class EngineClient:
    """Every call has a deadline. An EngineError names the caller, the engine and the request.

    url        "http://host:port" of a vLLM server in development mode
    timeout_s  deadline of sleep, wake-up and weight transfer; other calls have `QUICK_S`
    who        the caller, for error messages
    """

    def __init__(self, url: str, *, timeout_s: float = 900.0, who: str = "the trainer") -> None:
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self.who = who
        self.dialect = dialect_of(installed_version() or UNKNOWN_RELEASE)

    def __repr__(self) -> str:
        return f"EngineClient({self.url!r})"

    # -- health ----------------------------------------------------------------------------------

    def healthy(self, timeout_s: float = 5.0) -> bool:
        return local_http.healthy(self.url, timeout_s)

    def world_size(self) -> int:
        """The number of workers of this engine."""
        return int(self._call("GET", "/get_world_size")["world_size"])

    # -- generation ------------------------------------------------------------------------------

    def pause(self, mode: str = "keep") -> None:
        """keep: freeze requests until `resume`; abort: answer them now with their tokens so far.

        Cached keys and values stay. vLLM would drop those of frozen requests, too.
        """
        self._call("POST", "/pause", params={"mode": mode, "clear_cache": "false"})

    def resume(self) -> None:
        self._call("POST", "/resume")

    def abort_all(self) -> None:
        """Answer every running request with its tokens so far. New requests are not affected."""
        self.pause("abort")
        self.resume()

    def reset_prefix_cache(self) -> None:
        """Forget cached keys and values. Frozen requests recompute theirs when they continue."""
        self._call("POST", "/reset_prefix_cache", params={"reset_running_requests": "true"})

    def sleep(self, level: int = 1) -> None:
        self._call("POST", "/sleep", params={"level": level}, timeout_s=self.timeout_s)

    def wake_up(self, tags: tuple[str, ...] = ()) -> None:
        self._call("POST", "/wake_up", params={"tags": list(tags)}, timeout_s=self.timeout_s)

    # -- weights ---------------------------------------------------------------------------------

    def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        self._transfer("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._transfer("/start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._transfer("/update_weights", {"update_info": update_info})

    def finish_weight_update(self) -> None:
        self._transfer("/finish_weight_update")

    def set_weight_version(self, version: int) -> list[int]:
        """Set the version of every worker. The engine stamps new tokens with it.

        Returns the version that each worker now reports.
        """
        held = _versions(self.rpc("vime_set_weight_version", version))
        self._call("POST", "/update_weight_version", json={"new_version": str(version)})
        return held

    def weight_versions(self) -> list[int]:
        """The version that each worker of the engine reports."""
        return _versions(self.rpc("vime_weight_version"))

    def record_checksums(self) -> None:
        self.rpc("vime_record_checksums")

    def checksums(self) -> list[dict[str, str]]:
        """{tensor: checksum} of the tensors that arrived, for each worker."""
        return self.rpc("vime_checksums")

    def rpc(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker."""
        body = {"method": method, "args": list(args), "timeout": self.timeout_s}
        answer = self._call("POST", "/collective_rpc", json=body, timeout_s=self.timeout_s)
        return answer["results"]

    # --------------------------------------------------------------------------------------------

    def _transfer(self, path: str, json: dict[str, Any] | None = None) -> None:
        self._call("POST", path, json=json, timeout_s=self.timeout_s)

    def _call(self, verb: str, path: str, *, timeout_s: float = QUICK_S, **kw: Any) -> Any:
        request = f"{verb} {self.url}{path}"
        try:
            response = local_http.request(verb, self.url + path, timeout_s=timeout_s, **kw)
        except requests.Timeout as error:
            raise EngineError(
                f"{self.who} waited {timeout_s:.0f} s for the engine: {request}"
            ) from error
        except requests.RequestException as error:
            raise EngineError(f"{self.who} lost the engine: {request}: {error}") from error
        if not response.ok:
            raise EngineError(
                f"the engine refused {self.who}: {request}: "
                f"{response.status_code} {response.text[:500]}"
            )
        return response.json() if response.content else None


def _versions(answers: list[dict[str, Any]]) -> list[int]:
    return [int(answer["version"]) for answer in answers]

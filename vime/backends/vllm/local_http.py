"""Requests within a run, which never pass through a proxy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import requests

_ALWAYS = ("127.0.0.1", "localhost", "::1")


def request(verb: str, url: str, *, timeout_s: float, **kw: Any) -> requests.Response:
    """A request to a server of this run. Raises requests.RequestException."""
    with requests.Session() as session:
        session.trust_env = False  # http_proxy is meant for the world outside the run
        return session.request(verb, url, timeout=timeout_s, **kw)


def healthy(url: str, timeout_s: float) -> bool:
    """Whether the server's /health answers well."""
    try:
        return request("GET", f"{url}/health", timeout_s=timeout_s).ok
    except requests.RequestException:
        return False


def without_proxies(env: Mapping[str, str], *hosts: str) -> dict[str, str]:
    """A child's environment in which these hosts and this machine are reached without a proxy."""
    given = env.get("no_proxy") or env.get("NO_PROXY") or ""
    names = dict.fromkeys([*filter(None, given.split(",")), *_ALWAYS, *hosts])
    exempt = ",".join(names)
    return {**env, "no_proxy": exempt, "NO_PROXY": exempt}

"""Requests within a run, which never pass through a proxy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import requests

from vime.addresses import LOOPBACK

_ALWAYS = (LOOPBACK, "localhost", "::1")


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
    """The environment in which these hosts and this machine are reached without a proxy.

    IPv6 addresses stand in it without brackets: httpx, which vLLM uses, ends with an error at an
    entry in brackets.
    """
    given = env.get("no_proxy") or env.get("NO_PROXY") or ""
    names = dict.fromkeys(
        [*filter(None, given.split(",")), *_ALWAYS, *(host.strip("[]") for host in hosts)]
    )
    exempt = ",".join(names)
    return {**env, "no_proxy": exempt, "NO_PROXY": exempt}

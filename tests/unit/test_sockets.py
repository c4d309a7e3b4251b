"""A rollout opens no more connections than the machine can hold."""

import resource

import pytest

from tests.unit.fake_engine import make_config
from vime.config.view import ArgsView
from vime.rollout import generation, sockets


@pytest.fixture
def limits(monkeypatch, tmp_path):
    """set(files, ports): the limits that the machine seems to have."""
    asked = []

    def change(files, ports):
        monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, files))
        monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: asked.append(pair))
        monkeypatch.setattr(sockets, "PORT_RANGE", tmp_path / "range")
        (tmp_path / "range").write_text(f"10000\t{10000 + ports - 1}\n")
        return asked

    return change


def test_files_or_ports_limit_the_open_requests(limits):
    asked = limits(files=21_024, ports=28_000)
    assert sockets.most_requests() == (10_000, "ulimit -n 21024")
    assert asked == [(21_024, 21_024)]  # the soft limit was raised
    limits(files=2**20, ports=28_000)
    most, setting = sockets.most_requests()
    assert most == 28_000 - 1024
    assert "ip_local_port_range = 10000 37999" in setting


def test_an_unlimited_machine_counts_as_a_million_files(limits):
    limits(files=resource.RLIM_INFINITY, ports=2**22)
    assert sockets.most_requests()[0] == (2**20 - 1024) // 2


def test_the_client_stays_below_the_limit_and_says_so(limits, tmp_path, caplog):
    limits(files=21_024, ports=28_000)
    urls = tuple(f"http://h:{port}" for port in range(256))
    where = {"vllm_router_ip": "h", "vllm_router_port": 1, "vllm_engine_urls": urls}

    def client(prompts):
        batch = {"prompts": prompts, "samples_per_prompt": 8}
        return generation.make_client(ArgsView(make_config(tmp_path, batch=batch), **where))

    assert client(32)._slots._value == 10_000
    assert not caplog.records  # 256 requests fit
    assert client(12_500)._slots._value == 10_000
    assert "only 10000 requests are open at once" in caplog.text
    assert "ulimit -n 21024" in caplog.text

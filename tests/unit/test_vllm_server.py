"""How a server starts, is guarded and ends, and which flags are refused. Needs no vLLM."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.cpu.tiny import make_config
from tests.unit.process_groups import group_members
from vime import platform
from vime.addresses import free_port
from vime.backends.vllm import cpu, plugin, plugin_patches, server
from vime.backends.vllm.client import EngineClient
from vime.backends.vllm.dialect import dialect_of
from vime.backends.vllm.flags import check_vllm_flags
from vime.backends.vllm.local_http import without_proxies
from vime.backends.vllm.process import GuardedProcess
from vime.backends.vllm.router import Router
from vime.backends.vllm.spelling import whole_number
from vime.errors import EngineError
from vime.patches import Patch, apply_once

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return tmp_path


def argv(cfg, on=platform.CPU, version="0.32.0") -> list[str]:
    where = {"host": "127.0.0.1", "port": 1234, "dialect": dialect_of(version), "on": on}
    return server.command(cfg, 2, **where)


def value(words: list[str], flag: str) -> str | None:
    return words[words.index(flag) + 1] if flag in words else None


def part_argv(cfg, index: int) -> list[str]:
    part = server.Part(index, 2, "10.0.0.1", 4321)
    where = {"host": "10.0.0.1", "port": 1234, "dialect": dialect_of("0.25.1")}
    return server.command(cfg, 2, **where, on=platform.CUDA, part=part)


def test_the_parts_of_an_engine_on_two_nodes_meet_on_the_first_which_alone_serves(folder):
    cfg = make_config(folder, cluster={"gpus_per_engine": 16, "rollout_gpus_asked": 16})
    leader, follower = part_argv(cfg, 0), part_argv(cfg, 1)
    for words in (leader, follower):
        assert value(words, "--nnodes") == "2"
        assert value(words, "--master-addr") == "10.0.0.1"
        assert value(words, "--master-port") == "4321"
        assert value(words, "--tensor-parallel-size") == "16"
        assert value(words, "--distributed-executor-backend") == "mp"
    assert (value(leader, "--node-rank"), value(follower, "--node-rank")) == ("0", "1")
    assert leader[2] == "vllm.entrypoints.openai.api_server"
    assert (value(leader, "--host"), value(leader, "--port")) == ("10.0.0.1", "1234")
    assert follower[2] == "vime.backends.vllm.plugin_headless"
    assert not {"--host", "--port", "--middleware"} & set(follower)


def test_the_parts_of_an_engine_run_the_same_model_in_the_same_way(folder):
    cfg = make_config(folder, cluster={"gpus_per_engine": 16, "rollout_gpus_asked": 16})
    shared = (set(part_argv(cfg, 0)) ^ set(part_argv(cfg, 1))) - {
        "vllm.entrypoints.openai.api_server",
        "vime.backends.vllm.plugin_headless",
        "vime.backends.vllm.plugin_route.PackedAnswers",
        *("--middleware", "--host", "--port", "1234", "0", "1"),
    }
    assert shared == set()


def test_an_engine_on_one_node_has_no_flag_for_several(folder):
    assert not {"--nnodes", "--node-rank", "--master-addr"} & set(argv(make_config(folder)))


def test_the_workers_of_a_node_divide_its_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    large = SHAPE | {"hidden_size": 1024, "intermediate_size": 4096}
    (tmp_path / "config.json").write_text(json.dumps(large))
    cfg = make_config(tmp_path, cluster={"rollout_gpus_asked": 8})
    assert cpu.num_threads(cfg) == 2
    assert cpu.num_threads(cfg, workers=4) == 4


def test_releases_that_need_a_flag_for_token_ids_get_it(folder):
    cfg = make_config(folder)
    assert "--enable-scale-out" in argv(cfg)
    assert "--enable-scale-out" not in argv(cfg, version="0.25.1")


def test_an_engine_has_its_own_seed_and_the_trainers_dtype(folder):
    words = argv(make_config(folder, algorithm={"seed": 100}))
    assert value(words, "--seed") == "102"
    assert value(words, "--dtype") == "float32"
    assert value(words, "--logprobs-mode") == "processed_logprobs"
    assert value(argv(make_config(folder), on=platform.CUDA), "--dtype") == "bfloat16"


@pytest.mark.parametrize(
    ("colocate", "on", "backend"),
    [
        (True, platform.CPU, "vime_shm"),
        (False, platform.CPU, "vime_gloo"),
        (True, platform.CUDA, "vime_ipc"),
        (False, platform.CUDA, "vime_nccl"),
    ],
)
def test_placement_and_platform_decide_the_transport(folder, colocate, on, backend):
    cfg = make_config(folder, cluster={"colocate": colocate})
    assert json.loads(value(argv(cfg, on=on), "--weight-transfer-config")) == {"backend": backend}


def test_the_context_fits_the_longest_sequence(folder):
    rollout = {"max_prompt_len": 32, "max_response_len": 64}
    assert value(argv(make_config(folder, rollout=rollout)), "--max-model-len") == "96"
    longer = {"interval": 5, "prompt_data": ["p"], "max_response_len": 128}
    assert (
        value(argv(make_config(folder, rollout=rollout, eval=longer)), "--max-model-len") == "160"
    )
    endless = {"interval": 5, "prompt_data": ["p"], "max_response_len": 4096}
    assert (
        value(argv(make_config(folder, rollout=rollout, eval=endless)), "--max-model-len") == "512"
    )


def test_prompts_without_a_bound_leave_the_context_to_the_model(folder):
    assert "--max-model-len" not in argv(make_config(folder))


def test_a_users_flag_wins(folder):
    given = {"max_model_len": "128", "max_num_seqs": "8"}
    words = argv(make_config(folder, engine={"vllm_args": given}))
    assert value(words, "--max-model-len") == "128"
    assert words.count("--max-model-len") == 1
    assert value(words, "--max-num-seqs") == "8"


def test_latent_attention_on_cpu_uses_the_backend_that_computes_in_float32(folder):
    assert "--attention-backend" not in argv(make_config(folder))
    latent = folder / "latent"
    latent.mkdir()
    (latent / "config.json").write_text(json.dumps(SHAPE | {"kv_lora_rank": 16}))
    assert value(argv(make_config(latent)), "--attention-backend") == "CPU_MLA"
    assert "--attention-backend" not in argv(make_config(latent), on=platform.CUDA)
    given = {"attention_backend": "AMX_MLA"}
    words = argv(make_config(latent, engine={"vllm_args": given}))
    assert (value(words, "--attention-backend"), words.count("CPU_MLA")) == ("AMX_MLA", 0)


def test_packed_answers_do_not_bypass_an_api_key(folder, monkeypatch):
    """The middleware runs before vLLM checks the key, which a flag or the environment may set."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    cfg = make_config(folder)
    with_flag = make_config(folder, engine={"vllm_args": {"api_key": ["k1", "k2"]}})
    assert "--middleware" in argv(cfg)
    assert "--middleware" not in argv(with_flag)
    assert (server.api_key(cfg), server.api_key(with_flag)) == (None, "k1")
    monkeypatch.setenv("VLLM_API_KEY", "k3")
    assert "--middleware" not in argv(cfg)
    assert (server.api_key(cfg), server.api_key(with_flag)) == ("k3", "k1")


def test_a_key_is_in_the_environment_of_an_engine_and_not_on_its_command_line(folder, monkeypatch):
    """Every user of a machine sees the command lines of its processes."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    for given in ("k1", ["k1"]):
        cfg = make_config(folder, engine={"vllm_args": {"api_key": given}})
        assert "k1" not in argv(cfg)
        assert key_of(cfg) == "k1"
    several = make_config(folder, engine={"vllm_args": {"api_key": ["k1", "k2"]}})
    assert argv(several)[-3:] == ["--api-key", "k1", "k2"]
    monkeypatch.setenv("VLLM_API_KEY", "")
    assert not key_of(make_config(folder))


def key_of(cfg) -> str | None:
    env = server.environment(cfg, [0], dialect=dialect_of("0.32.0"), on=platform.CPU)
    return env.get("VLLM_API_KEY")


def test_on_cpu_the_share_of_gpu_memory_is_dropped_with_a_notice(folder, monkeypatch):
    cfg = make_config(folder, engine={"vllm_args": {"gpu_memory_utilization": "0.7"}})
    assert "--gpu-memory-utilization" not in argv(cfg)
    assert value(argv(cfg, on=platform.CUDA), "--gpu-memory-utilization") == "0.7"
    monkeypatch.setattr(platform, "current", lambda: platform.CPU)
    assert "--vllm-kv-cache-memory-bytes" in cpu.memory_notice(cfg)
    monkeypatch.setattr(platform, "current", lambda: platform.CUDA)
    assert cpu.memory_notice(cfg) is None


def test_the_kv_cache_on_cpu_holds_at_least_one_full_sequence(folder):
    (folder / "config.json").write_text(
        json.dumps(SHAPE | {"num_hidden_layers": 64, "max_position_embeddings": 262144})
    )
    token_bytes = 2 * 64 * 2 * 32 * 4
    assert cpu.kv_cache_bytes(make_config(folder)) == 262144 * token_bytes


def test_a_tiny_model_runs_on_one_thread(folder):
    env = server.environment(
        make_config(folder), [0], dialect=dialect_of("0.32.0"), on=platform.CPU
    )
    assert env["OMP_NUM_THREADS"] == "1"


def test_a_server_names_the_changes_to_vllm_that_it_needs(folder):
    def patches(on, **cluster) -> set[str]:
        cfg = make_config(folder, cluster=cluster)
        env = server.environment(cfg, [0, 1], dialect=dialect_of("0.32.0"), on=on)
        return set(env[plugin.ENGINE_PATCHES].split(","))

    assert patches(platform.CUDA) == {"inspect models here"}
    assert patches(platform.CPU) == {p.name for p in plugin_patches.PATCHES}


def test_the_owner_of_an_engine_starts_a_server_without_importing_torch(folder):
    """Nobody needs it there, and the import delays the server's own start by seconds."""
    code = """
import pickle, sys
from vime.backends.vllm import engine, server
from vime.backends.vllm.dialect import dialect_of
cfg, on = pickle.loads(bytes.fromhex(sys.argv[1]))
dialect = dialect_of("0.32.0")
server.command(cfg, 0, host="127.0.0.1", port=1, dialect=dialect, on=on)
server.environment(cfg, [0], dialect=dialect, on=on)
print({"ray", "torch", "vllm"} & sys.modules.keys())
"""
    given = pickle.dumps((make_config(folder), platform.CPU)).hex()
    done = subprocess.run([sys.executable, "-c", code, given], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


# -- flags ---------------------------------------------------------------------------------------


def check(folder, **given) -> list[str]:
    return check_vllm_flags(make_config(folder, engine={"vllm_args": given}))


def test_common_flags_are_accepted_without_vllms_parser(folder, monkeypatch):
    monkeypatch.setattr("vime.backends.vllm.flags.subprocess", None)
    assert not check(
        folder,
        gpu_memory_utilization="0.7",
        max_model_len="16k",
        max_num_seqs="256",
        max_num_batched_tokens="8192",
        enforce_eager=True,
    )


def test_an_unusable_value_is_refused_with_the_flag_and_a_remedy(folder):
    (problem,) = check(folder, gpu_memory_utilization="70")
    assert problem.startswith("--vllm-gpu-memory-utilization 70 is not usable")
    assert "0.7" in problem


def test_a_flag_that_vime_sets_is_refused_with_the_flag_to_use(folder):
    (problem,) = check(folder, tensor_parallel_size="2")
    assert "--rollout-num-gpus-per-engine" in problem


def test_a_head_size_that_kills_vllm_on_cpu_is_refused_before_the_start(folder, monkeypatch):
    (folder / "config.json").write_text(json.dumps(SHAPE | {"head_dim": 16}))
    monkeypatch.setattr(platform, "current", lambda: platform.CPU)
    (problem,) = check(folder)
    assert "head_dim 16" in problem
    monkeypatch.setattr(platform, "current", lambda: platform.CUDA)
    assert check(folder) == []


def test_whole_numbers_are_read_as_vllm_reads_them():
    assert [whole_number(s) for s in ("8192", "8k", "8K", "1.5k")] == [8192, 8000, 8192, 1500]
    assert whole_number("many") is None


# -- processes -----------------------------------------------------------------------------------


def gone(pgid: int) -> bool:
    deadline = time.monotonic() + 60
    while group_members(pgid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not group_members(pgid)


PARENT_OF_A_STUBBORN_CHILD = """
import signal, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child])
print("up", flush=True)
time.sleep(600)
"""


def guarded(tmp_path: Path, source: str) -> GuardedProcess:
    command = [sys.executable, "-c", source]
    return GuardedProcess("server", command, dict(os.environ), tmp_path / "server.log")


def test_stopping_ends_the_whole_group(tmp_path):
    process = guarded(tmp_path, PARENT_OF_A_STUBBORN_CHILD)
    process.wait_until(lambda: "up" in process.tail(), 120, "--flag")
    pgid = process.guard.pid
    assert len(group_members(pgid)) == 3
    process.stop()
    assert gone(pgid)
    process.stop()


def test_a_server_that_dies_raises_an_error_with_the_end_of_its_log(tmp_path):
    process = guarded(tmp_path, "import sys; print('out of memory'); sys.exit(3)")
    with pytest.raises(EngineError, match=r"(?s)code 3.*server\.log.*out of memory"):
        process.wait_until(lambda: False, 120, "--flag")


def test_a_server_that_never_gets_healthy_is_stopped_and_the_error_names_the_flag(tmp_path):
    process = guarded(tmp_path, "import time; time.sleep(600)")
    with pytest.raises(EngineError, match="--vllm-start-timeout-sec"):
        process.wait_until(lambda: False, 0.3, "--vllm-start-timeout-sec")
    assert gone(process.guard.pid)


SERVER = """
import http.server
http.server.HTTPServer(("127.0.0.1", {port}), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def test_a_foreign_server_on_the_port_does_not_make_a_process_healthy(tmp_path):
    port = free_port()
    owner = guarded(tmp_path / "owner", SERVER.format(port=port))
    other = guarded(tmp_path / "other", "import time; time.sleep(600)")
    try:
        owner.wait_until(lambda: owner.serves("127.0.0.1", port), 120)
        assert not other.serves("127.0.0.1", port)
        late = guarded(tmp_path / "late", SERVER.format(port=port))
        with pytest.raises(EngineError, match="(?s)ended with code 1.*Address already in use"):
            late.wait_until(lambda: late.serves("127.0.0.1", port), 120)
    finally:
        for process in (owner, other):
            process.stop()


@contextlib.contextmanager
def health_server():
    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_control_calls_pass_by_the_proxy_of_the_environment(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with health_server() as port:
        assert EngineClient(f"http://127.0.0.1:{port}").healthy()


def test_children_reach_the_hosts_of_the_run_without_a_proxy():
    env = without_proxies({"no_proxy": "example.org,10.0.0.2", "x": "y"}, "10.0.0.2", "10.0.0.3")
    exempt = "example.org,10.0.0.2,127.0.0.1,localhost,::1,10.0.0.3"
    assert env == {"no_proxy": exempt, "NO_PROXY": exempt, "x": "y"}


def test_the_routers_port_may_not_be_another_programs(tmp_path):
    with health_server() as port:
        cfg = make_config(tmp_path, engine={"router_port": port}, log={"run_dir": str(tmp_path)})
        router = Router(cfg)
        with pytest.raises(EngineError, match=f"--vllm-router-port {port}: another program"):
            router.start(["http://127.0.0.1:1"])
    assert router.process is None


def test_sockets_of_an_engine_fit_into_a_long_temporary_folder(monkeypatch):
    monkeypatch.setattr(server.tempfile, "gettempdir", lambda: "/tmp")
    assert server.short_socket_paths({}) == {}
    monkeypatch.setattr(server.tempfile, "gettempdir", lambda: "/scratch/" + "a" * 70)
    assert server.short_socket_paths({}) == {"VLLM_RPC_BASE_PATH": "/tmp"}
    assert server.short_socket_paths({"VLLM_RPC_BASE_PATH": "/x"}) == {}


def test_a_server_dies_with_its_killed_owner(tmp_path):
    owner = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(f"""
            import os, sys, time
            from pathlib import Path
            from vime.backends.vllm.process import GuardedProcess
            command = [sys.executable, "-c", {PARENT_OF_A_STUBBORN_CHILD!r}]
            p = GuardedProcess("server", command, dict(os.environ), Path({str(tmp_path)!r}) / "log")
            p.wait_until(lambda: "up" in p.tail(), 120, "--flag")
            print(p.guard.pid, flush=True)
            time.sleep(600)
            """),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    pgid = int(owner.stdout.readline())
    assert len(group_members(pgid)) == 3
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert gone(pgid)


def test_a_server_dies_with_its_killed_guard(tmp_path):
    process = guarded(tmp_path, "import time; print('up', flush=True); time.sleep(600)")
    process.wait_until(lambda: "up" in process.tail(), 120, "--flag")
    process.guard.kill()
    assert gone(process.guard.pid)


def test_the_error_for_a_missing_engine_names_both_sides():
    client = EngineClient(f"http://127.0.0.1:{free_port()}", who="trainer rank 0")
    assert not client.healthy()
    with pytest.raises(EngineError, match="trainer rank 0 lost the engine: POST http"):
        client.resume()


class Runner:
    """The part of vLLM's CPU runner that `keep_seeds_of_split_prompts` touches."""

    def __init__(self, unfinished: list[bool]) -> None:
        generators = {i: torch.Generator().manual_seed(i) for i in (0, 2)}
        self.input_batch = SimpleNamespace(num_reqs=len(unfinished), generators=generators)
        self.discard_request_mask = SimpleNamespace(np=np.array([*unfinished, True]))

    def _sample(self) -> list[int]:
        return sorted(self.input_batch.generators)

    def _bookkeeping_sync(self) -> None:
        for i in self.input_batch.generators:
            if self.discard_request_mask.np[i]:  # vLLM does this; a CPU generator refuses
                generator = self.input_batch.generators[i]
                generator.set_offset(generator.get_offset() - 4)


def test_a_seeded_request_with_a_split_prompt_keeps_its_generator():
    with pytest.raises(RuntimeError, match="offset"):
        Runner([False, False, True])._bookkeeping_sync()
    patched = type("Patched", (Runner,), {})
    patch = Patch(
        "seeds of Patched", "", "", (), lambda: plugin_patches.keep_seeds_of_split_prompts(patched)
    )
    apply_once([patch])
    apply_once([patch])  # a second time changes nothing
    runner = patched([False, False, True])
    untouched = runner.input_batch.generators[2]
    assert runner._sample() == [0]
    runner._bookkeeping_sync()
    assert sorted(runner.input_batch.generators) == [0, 2]
    assert runner.input_batch.generators[2] is untouched

    plugin_patches.keep_seeds_of_split_prompts(
        object
    )  # a release without these methods is left alone

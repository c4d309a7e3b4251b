"""CPU time and memory of a rollout of up to 100,000 samples of 8k tokens, without a GPU.

    make bench-rollout-scale

256 fake engines (`fake_engines.py`) answer over HTTP, behind a real vllm-router. The real rollout
function generates and grades, the real batching packs for 128 data-parallel ranks, and Ray's object
store carries each rank's part of the batch. Each size runs in its own process, so that peaks of
memory do not mix. The times are CPU seconds, because the machine has other work.

Generation is the yardstick: all tokens, at the measured rate of a 4B engine, on 256 GPUs. Each part
may take a tenth of that. The figures of TARGET_SIZE samples are those of the largest size that ran,
scaled; `exponent` says how a part grows with the number of samples, and is 1 if it is linear.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.configs import config_of  # noqa: E402
from benchmarks.records import RESULTS, on_this_cpu, save  # noqa: E402

RESULT = RESULTS / "rollout_scale.json"
RATE = RESULTS / "rollout_http_ratio_4b.json"
SIZES = (3_000, 6_000, 12_000, 25_000)
TARGET_SIZE = 100_000
ENGINES, PROCESSES = 256, 2
TP = 2  # so 256 GPUs have 128 data-parallel ranks
SAMPLES_PER_PROMPT = 8
PROMPT_DIGITS, NUM_TOKENS, VOCAB = 120, 8192, 151_936
TARGET = 0.10
BESIDE = ("router_cpu_s", "aiohttp_cpu_s")  # no parts: other processes' work, part of another part


@dataclass(frozen=True)
class Part:
    """What one part of a rollout cost.

    cpu_s     CPU seconds of the process that does the work
    wall_s    on a machine with other work
    peak_gib  memory above the memory from before the part, at its highest, with the object store's
    kept_gib  the process's own memory above it at the end
    """

    cpu_s: float
    wall_s: float
    peak_gib: float
    kept_gib: float


@contextlib.contextmanager
def measured(parts: dict[str, Part], name: str) -> Iterator[None]:
    """Adds the cost of a block in this process to `parts`."""
    before_gib, all_before_gib = resident_gib(), status_gib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    cpu_s, wall_s = time.process_time() - cpu, time.perf_counter() - wall
    part = Part(cpu_s, wall_s, status_gib("VmHWM") - all_before_gib, resident_gib() - before_gib)
    parts[name] = part
    print(
        f"  {name:24} {json.dumps({k: round(v, 3) for k, v in asdict(part).items()})}", flush=True
    )


def resident_gib() -> float:
    """Memory of this process, without pages of the object store, which it shares."""
    return status_gib("RssAnon")


def status_gib(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 2**20
    raise KeyError(name)


# -- one rollout, in its own process ---------------------------------------------------------------


async def graded(args: Any, sample: Any, **kwargs: Any) -> float:
    """--custom-rm-path: every second sample is right."""
    return float(sample.index % 2)


def rollout_config(folder: Path, num_samples: int, num_tokens: int) -> Any:
    """Trainer and engines have 256 GPUs each: 128 data-parallel ranks, 256 engines."""
    rows = ({"prompt": f"{i:0{PROMPT_DIGITS}}"} for i in range(num_samples // SAMPLES_PER_PROMPT))
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config_of(
        model={"hf_checkpoint": str(folder / "model")},
        cluster={"actor_num_nodes": ENGINES // 8, "actor_gpus_per_node": 8, "colocate": True},
        parallel={"tp": TP},
        batch={
            "prompts": num_samples // SAMPLES_PER_PROMPT,
            "samples_per_prompt": SAMPLES_PER_PROMPT,
            "dynamic": True,
            "max_tokens_per_gpu": 2 * (num_tokens + PROMPT_DIGITS),
            "balance": True,
        },
        data={"prompt_data": str(prompts), "input_key": "prompt"},
        rollout={"max_response_len": num_tokens},
        reward={"custom_rm_path": "benchmarks.rollout_scale.graded"},
        log={"run_dir": str(folder / "run")},
    )  # fmt: skip


@contextlib.contextmanager
def fake_engines(num_tokens: int, hold_s: float) -> Iterator[list[str]]:
    """URLs of the engines."""
    each = {
        "num": ENGINES // PROCESSES, "num_tokens": num_tokens, "vocab": VOCAB, "hold_s": hold_s
    }  # fmt: skip
    script = str(ROOT / "benchmarks/fake_engines.py")
    servers = [
        subprocess.Popen(
            [sys.executable, script, json.dumps({**each, "seed": seed})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(PROCESSES)
    ]
    try:
        yield [f"http://127.0.0.1:{p}" for s in servers for p in json.loads(s.stdout.readline())]
    finally:
        for server in servers:
            server.stdin.close()
            server.wait()


def one_rollout(num_samples: int, num_tokens: int, hold_s: float) -> dict[str, Any]:
    """{part: its cost} of a rollout, from the request to a rank."""
    from scripts.quickstart.model import write_checkpoint
    from vime.backends.vllm.router import Router, address_in_args
    from vime.config.view import ArgsView
    from vime.data import chat
    from vime.rollout.data_source import RolloutDataSourceWithBuffer
    from vime.rollout.train_data import make_train_batch
    from vime.rollout.vllm_rollout import generate_rollout

    parts: dict[str, Part] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder / "model", seed=0)
        cfg = rollout_config(folder, num_samples, num_tokens)
        chat.load_tokenizer(cfg.model.hf_checkpoint)
        router = Router(cfg)
        with fake_engines(num_tokens, hold_s) as urls:
            try:
                where = address_in_args(router.start(urls))
                args = ArgsView(cfg, vllm_engine_urls=tuple(urls), **where)
                source = RolloutDataSourceWithBuffer(args)
                with measured(parts, "generate"):
                    output = generate_rollout(args, 0, source)
                router_cpu_s = cpu_of(router.process.guard.pid)
                aiohttp_cpu_s = aiohttp_alone(router.url, num_samples)
            finally:
                router.stop()
        assert not output.metrics["rollout/request_retries"]
        samples = [s for group in output.samples for s in group]
        assert len(samples) == num_samples
        assert all(s.response_length == num_tokens for s in samples)
        with measured(parts, "batch"):
            batch = make_train_batch(args, output.samples, 0)
        through_store(parts, batch)
    return {
        "num_samples": num_samples,
        "num_tokens": num_samples * num_tokens,
        "router_cpu_s": router_cpu_s,
        "aiohttp_cpu_s": aiohttp_cpu_s,
        "parts": {name: asdict(part) for name, part in parts.items()},
    }


def aiohttp_alone(router_url: str, num_requests: int) -> float:
    """CPU seconds of aiohttp for the same requests and answers, which nobody reads."""
    from vime.rollout.posting import Endpoint
    from vime.rollout.sockets import most_requests
    from vime.rollout.vllm_rollout import run
    from vime.rollout.wire import ALL, PACKED, PATH, TEXT, build_request

    body = build_request(list(range(PROMPT_DIGITS)), {"max_tokens": NUM_TOKENS})

    async def post_all() -> None:
        slots = asyncio.Semaphore(most_requests()[0])
        headers = {"Content-Type": "application/json", PACKED: "1", TEXT: ALL}
        session = Endpoint(router_url + PATH, timeout_s=600).session(headers)

        async def post() -> None:
            async with slots, session.post(router_url + PATH, data=body) as response:
                await response.read()

        async with session:
            await asyncio.gather(*(post() for _ in range(num_requests)))

    cpu = time.process_time()
    run(post_all())
    return time.process_time() - cpu


def cpu_of(group: int) -> float:
    from benchmarks.rollout import cpu_of_group

    return cpu_of_group(group)


def through_store(parts: dict[str, Part], batch: Any) -> None:
    """Puts all ranks' parts into Ray's object store; a rank, in its own process, gets its part."""
    import ray

    from vime.data.train_batch import parts_of

    num_tokens = sum(s.length for s in batch.sequences)
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        logging_level="error",
        object_store_memory=2**28 + 24 * num_tokens,
    )
    try:
        ray.get(ray.remote(lambda: None).remote())  # the first worker has started
        with measured(parts, "put"):
            refs = [ray.put(part) for part in parts_of(batch, ENGINES // TP)]
        parts |= ray.get(ray.remote(get_on_rank).remote(refs[:1]))
    finally:
        ray.shutdown()


def get_on_rank(refs: list[Any]) -> dict[str, Part]:
    """What a trainer's rank pays for its part of the batch."""
    import ray

    parts: dict[str, Part] = {}
    with measured(parts, "get"):
        part = ray.get(refs[0])
    assert any(s.tokens.any() for s in part.sequences.values())
    return parts


# -- all sizes -------------------------------------------------------------------------------------


def in_own_process(num_samples: int, options: argparse.Namespace) -> dict[str, Any]:
    words = [sys.executable, str(Path(__file__).resolve()), "--alone"]
    words += ["--samples", str(num_samples), "--tokens", str(options.tokens)]
    words += ["--hold", str(options.hold)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def generation_s(num_tokens: int, tokens_per_s: float) -> float:
    """Seconds in which ENGINES engines make so many tokens."""
    return num_tokens / (ENGINES * tokens_per_s)


def growth(sizes: Sequence[int], costs: Sequence[float]) -> float:
    """The exponent of cost = a x size ** exponent, by least squares; 1.0 is linear."""
    xs, ys = [math.log(n) for n in sizes], [math.log(max(c, 1e-6)) for c in costs]
    return statistics.linear_regression(xs, ys).slope


def summarize(runs: list[dict[str, Any]], tokens_per_s: float) -> list[dict[str, Any]]:
    """Figures for the result file: each part's share of generation and memory, by size.

    The part with the largest share breaks first, and its figure says so. A size alone has no
    exponent.
    """
    runs = sorted(runs, key=lambda run: run["num_samples"])
    sizes, last = [run["num_samples"] for run in runs], runs[-1]
    scale = TARGET_SIZE / last["num_samples"]
    common = {**on_this_cpu(("ray", "vllm-router", "aiohttp", "numpy")), "target": TARGET}
    figures = []
    for name in last["parts"]:
        costs = [run["parts"][name] for run in runs]
        shares = [
            cost["cpu_s"] / generation_s(run["num_tokens"], tokens_per_s)
            for run, cost in zip(runs, costs, strict=True)
        ]
        figures.append(
            {
                "name": f"rollout_scale/{name}",
                "unit": "share of the time of generation",
                "value": round(shares[-1], 4),
                "spread": [round(min(shares), 4), round(max(shares), 4)],
                "exponent": round(growth(sizes, [c["cpu_s"] for c in costs]), 3)
                if len(runs) > 1
                else None,
                "at_the_target_size": {
                    "num_samples": TARGET_SIZE,
                    "cpu_s": round(costs[-1]["cpu_s"] * scale, 2),
                    "peak_gib": round(costs[-1]["peak_gib"] * scale, 2),
                },
                "by_size": {str(n): c for n, c in zip(sizes, costs, strict=True)},
                **common,
            }
        )
    first = max(figures, key=lambda figure: figure["value"])
    figures = [{**figure, "breaks_first": figure is first} for figure in figures]
    return figures + [beside_generate(name, runs) for name in BESIDE if name in last]


def beside_generate(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds a sample of something that explains the cost of `generate`."""
    by_size = {str(run["num_samples"]): 1000 * run[name] / run["num_samples"] for run in runs}
    values = list(by_size.values())
    return {
        "name": f"rollout_scale/{name.removesuffix('_cpu_s')}",
        "unit": "CPU ms a sample",
        "value": round(values[-1], 3),
        "spread": [round(min(values), 3), round(max(values), 3)],
        "by_size": {size: round(value, 3) for size, value in by_size.items()},
        **on_this_cpu(("vllm-router", "aiohttp")),
    }


def measured_rate() -> float:
    """Tokens per second of a 4B engine on one GPU, through router and HTTP."""
    return json.loads(RATE.read_text())["tok_per_s"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS)
    parser.add_argument("--hold", type=float, default=0.0, help="s; answers wait so long")
    parser.add_argument("--alone", action="store_true", help="one size, in this process")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(one_rollout(options.samples[0], options.tokens, options.hold)))
        return 0
    runs = []
    for num_samples in options.samples:
        print(f"{num_samples} samples of {options.tokens} tokens", flush=True)
        runs.append(in_own_process(num_samples, options))
    figures = summarize(runs, measured_rate())
    for f in figures:
        if f["unit"] == "CPU ms a sample":
            print(f"{f['name']:26} {f['value']} CPU ms a sample")
            continue
        at = f["at_the_target_size"]
        print(
            f"{f['name']:26} {f['value']:8.1%} of generation (target {TARGET:.0%}), "
            f"exponent {f['exponent']}; {TARGET_SIZE} samples: {at['cpu_s']} CPU s, "
            f"{at['peak_gib']} GiB" + ("; breaks first" if f["breaks_first"] else "")
        )
    save(options.output, figures)
    print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

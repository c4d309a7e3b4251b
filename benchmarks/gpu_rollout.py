"""The cost of rollout function, router and HTTP on a GPU, in Qwen3 shapes.

    python benchmarks/gpu_rollout.py --shape 0.6B        512 requests of 1,024 tokens
    python benchmarks/gpu_rollout.py --shape 4B          256 requests of 1,024 tokens

The weights are random. First `generate_rollout` generates through vllm-router and a vLLM server.
Then the same engine generates in process, on the same GPU with the same prompts and lengths. The
figures are medians of the repeats after the first. The ratio has a target of 0.95.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_assets import visible_gpus, write_model, write_prompts  # noqa: E402
from benchmarks.process_group import wait_for_group  # noqa: E402
from benchmarks.records import quartiles, save_gpu_figure  # noqa: E402
from benchmarks.rollout import make_config  # noqa: E402
from vime.backends.vllm.engine import VLLMEngine  # noqa: E402
from vime.backends.vllm.router import Router, address_in_args  # noqa: E402
from vime.config import Config  # noqa: E402
from vime.config.view import ArgsView  # noqa: E402
from vime.rollout.data_source import RolloutDataSourceWithBuffer  # noqa: E402
from vime.rollout.vllm_rollout import generate_rollout  # noqa: E402

PROMPTS = {"0.6B": 64, "4B": 32}  # of 8 samples each
NUM_TOKENS = 1024
TARGET = 0.95


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="0.6B", choices=sorted(PROMPTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work-dir", type=Path, default=Path("/tmp/vime-gpu-rollout"))
    args = parser.parse_args()
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    num_prompts = PROMPTS[args.shape]
    model = write_model(args.work_dir / f"qwen3-{args.shape}", args.shape)
    engine_args = {
        "max_num_seqs": 8 * num_prompts,
        "max_model_len": 2048,
        "gpu_memory_utilization": 0.85,
    }
    cfg = make_config(
        args.work_dir,
        model=model,
        prompts=write_prompts(args.work_dir / "prompts.jsonl"),
        num_prompts=num_prompts,
        num_tokens=NUM_TOKENS,
        vllm_args=engine_args,
    )
    served, prompts, client_share = through_http(cfg, args.repeats)
    direct = in_process(cfg, engine_args, prompts, args.repeats)
    report(args.shape, served, direct, client_share)
    return 0


def through_http(cfg: Config, repeats: int) -> tuple[list[float], list[list[int]], float]:
    """Tokens/s of each repeat, the prompts' token ids, and the client's CPU seconds per second."""
    engine, router = VLLMEngine(cfg, 0, [int(visible_gpus()[0])]), Router(cfg)
    try:
        url = engine.start()
        router_url = router.start([url])
        args = ArgsView(cfg, vllm_engine_urls=(url,), **address_in_args(router_url))
        rates = []
        for _ in range(repeats + 1):
            source = RolloutDataSourceWithBuffer(args)
            before, started = os.times(), time.perf_counter()
            samples = [s for group in generate_rollout(args, 0, source).samples for s in group]
            seconds, after = time.perf_counter() - started, os.times()
            assert {s.response_length for s in samples} == {NUM_TOKENS}
            rates.append(len(samples) * NUM_TOKENS / seconds)
            share = (sum(after[:2]) - sum(before[:2])) / seconds
    finally:
        router.stop()
        engine.stop()
    return rates[1:], [s.tokens[: s.prompt_length] for s in samples], share


def in_process(
    cfg: Config, engine_args: dict[str, Any], prompts: list[list[int]], repeats: int
) -> list[float]:
    """Tokens/s of each repeat."""
    script = str(ROOT / "benchmarks/rollout_peer.py")
    words = [sys.executable, script, cfg.model.hf_checkpoint]
    words += [json.dumps(engine_args | {"dtype": "bfloat16", "seed": 0})]
    task = json.dumps({"prompts": prompts, "max_tokens": NUM_TOKENS}) + "\n"
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "WARNING"}
    peer = subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        assert peer.stdout.readline() == "ready\n", "the engine in process did not start"
        rates = []
        for _ in range(repeats + 1):
            peer.stdin.write(task)
            peer.stdin.flush()
            seconds = json.loads(peer.stdout.readline())["seconds"]
            rates.append(len(prompts) * NUM_TOKENS / seconds)
    finally:
        peer.stdin.close()  # ends its loop, and so the engine's own process
        wait_for_group(peer)
    return rates[1:]


def report(shape: str, served: list[float], direct: list[float], client_share: float) -> None:
    peer = quartiles(direct)
    ratio = quartiles([rate / peer["value"] for rate in served])
    rate = quartiles(served)
    print(f"\nQwen3-{shape} shapes, {8 * PROMPTS[shape]} requests of {NUM_TOKENS} tokens")
    print(f"  through router and HTTP {rate['value']:10.0f} tok/s {rate['spread']}")
    print(f"  in process              {peer['value']:10.0f} tok/s {peer['spread']}")
    print(f"  ratio                   {ratio['value']:10.3f} (target {TARGET})")
    print(f"  client                  {client_share:10.2f} cores")
    name = f"rollout_http_ratio_{shape.lower().replace('.', '_')}"
    also = {"tok_per_s": rate["value"], "target": TARGET, "client_cores": round(client_share, 3)}
    save_gpu_figure(name, ratio | also, "1", {"name": "vLLM in process, tok/s", **peer})


if __name__ == "__main__":
    sys.exit(main())

"""GRPO steps of TRL with colocated vLLM, for `gpu_step.py`: a JSON line after each but the first.

The settings are the fastest that were found for TRL on an 80 GB GPU: Liger's loss, micro-batches of
16 without activation checkpointing, the engine asleep while the trainer works. Long-tailed lengths
need micro-batches of 2, because TRL pads to the longest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vime.addresses import free_port  # noqa: E402

BATCH = 256
PADDED_TOKENS = 18_000  # the most that fit into a micro-batch
ENVIRONMENT = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
}


def main() -> None:
    args = parse()
    os.environ |= ENVIRONMENT
    trainer = make_trainer(args)
    if args.long_tail:
        draw_lengths(trainer.vllm_generation.llm, args.response)
    trainer.train()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--response", type=int, required=True, help="tokens")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--long-tail", action="store_true", help="lengths of gpu_assets.length_of")
    return parser.parse_args()


def make_trainer(args: argparse.Namespace) -> Any:
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    micro_batch = max(1, PADDED_TOKENS // args.response)
    micro_batch = 1 << (micro_batch.bit_length() - 1)  # a divisor of BATCH
    lines = [json.loads(line) for line in args.prompts.read_text().splitlines()]
    name = f"TRL {trl.__version__}, vLLM colocated, Liger loss, micro-batches of {micro_batch}"
    # The port is chosen after the imports, which take half a minute.
    os.environ["MASTER_PORT"] = str(free_port())
    return trl.GRPOTrainer(
        model=args.model,
        reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        args=settings(args, micro_batch),
        train_dataset=Dataset.from_list([{"prompt": line["prompt"]} for line in lines]),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        callbacks=[clock(name)],
    )


def clock(name: str) -> Any:
    """Times steps; prints {"name", "steps", "mismatch", "peak_gib"} after each but the first."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.started = 0.0
            self.steps: list[float] = []
            self.mismatch: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            self.steps.append(time.perf_counter() - self.started)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            found = (logs or {}).get("sampling/sampling_logp_difference/mean")
            if found is None:  # the summary at the end
                return
            self.mismatch.append(float(found))
            if len(self.steps) > 1:
                peak = torch.cuda.max_memory_allocated() / 2**30
                line = {"name": name, "steps": self.steps[1:], "mismatch": self.mismatch}
                print("\n" + json.dumps(line | {"peak_gib": peak}), flush=True)

    return Clock()


def settings(args: argparse.Namespace, micro_batch: int) -> Any:
    import trl

    return trl.GRPOConfig(
        output_dir="/tmp/trl",
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=BATCH // micro_batch,
        num_generations=8,
        max_completion_length=args.response,
        max_steps=args.steps,
        bf16=True,
        learning_rate=1e-6,
        beta=0.0,
        epsilon_high=0.28,
        temperature=1.0,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.4,
        vllm_enable_sleep_mode=True,
        gradient_checkpointing=False,
        use_liger_kernel=True,
        generation_kwargs={"ignore_eos": True},
        model_init_kwargs={"dtype": "bfloat16"},
        logging_steps=1,
        report_to=[],
        save_strategy="no",
    )


def draw_lengths(llm: Any, longest: int) -> None:
    """Ends every answer at its drawn length, as `gpu_assets.long_tail` does for vime."""
    from benchmarks.gpu_assets import length_of

    generate = llm.generate
    drawn = itertools.count()

    def generate_drawn(prompts: list, sampling_params: Any, **rest: Any) -> Any:
        assert (len(prompts), sampling_params.n) == (BATCH, 1)
        each = [sampling_params.clone() for _ in prompts]
        for params in each:
            params.max_tokens = length_of(next(drawn), longest)
        return generate(prompts, sampling_params=each, **rest)

    llm.generate = generate_drawn


if __name__ == "__main__":
    main()

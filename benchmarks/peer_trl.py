"""GRPO steps of TRL with vLLM colocated, for `gpu_step.py`: a JSON line after each but the first.

The settings are the fastest that were found for it on an 80 GB GPU: Liger's loss, micro-batches of
16 (2 for long-tailed lengths, since TRL pads to the longest) without checkpointing, the engine
asleep while the trainer works.
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

from vime.backends.vllm.process import free_port  # noqa: E402

BATCH = 256
PADDED_TOKENS = 18_000  # of a micro-batch, as many as fit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--response", type=int, required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--long-tail", action="store_true", help="lengths of gpu_assets.length_of")
    args = parser.parse_args()
    os.environ |= {
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        **dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1"),
    }
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    micro_batch = max(1, PADDED_TOKENS // args.response)
    micro_batch = 1 << (micro_batch.bit_length() - 1)  # a divisor of BATCH
    lines = [json.loads(line) for line in args.prompts.read_text().splitlines()]
    data = Dataset.from_list([{"prompt": line["prompt"]} for line in lines])
    name = f"TRL {trl.__version__}, vLLM colocated, Liger loss, micro-batches of {micro_batch}"
    steps: list[float] = []
    mismatch: list[float] = []

    class Clock(TrainerCallback):
        started = 0.0

        def on_step_begin(self, *_, **__):
            torch.cuda.synchronize()
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            torch.cuda.synchronize()
            steps.append(time.perf_counter() - self.started)

        def on_log(self, args, state, control, logs=None, **_):
            found = (logs or {}).get("sampling/sampling_logp_difference/mean")
            if found is None:  # the summary at the end
                return
            mismatch.append(float(found))
            if len(steps) > 1:
                peak = torch.cuda.max_memory_allocated() / 2**30
                line = {"name": name, "steps": steps[1:], "mismatch": mismatch, "peak_gib": peak}
                print("\n" + json.dumps(line), flush=True)

    os.environ["MASTER_PORT"] = str(free_port())  # as late as can be: imports take half a minute
    trainer = trl.GRPOTrainer(
        model=args.model,
        reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        args=settings(args, micro_batch),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(args.model),
        callbacks=[Clock()],
    )
    if args.long_tail:
        draw_lengths(trainer.vllm_generation.llm, args.response)
    trainer.train()


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
    """Lets every answer end at its drawn length, as `gpu_assets.long_tail` does for vime."""
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

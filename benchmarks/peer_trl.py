"""GRPO steps of TRL with vLLM colocated, for `gpu_step.py`: prints one JSON line last.

The settings are the fastest that were found for it on an 80 GB GPU: Liger's loss, micro-batches of
16 without checkpointing, the engine asleep while the trainer works.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

NUM_STEPS = 4
MICRO_BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--response", type=int, required=True)
    args = parser.parse_args()
    os.environ |= {
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        **dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1"),
        **dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="29555"),
    }
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    lines = [json.loads(line) for line in args.prompts.read_text().splitlines()]
    data = Dataset.from_list([{"prompt": line["prompt"]} for line in lines])
    settings = trl.GRPOConfig(
        output_dir="/tmp/trl",
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=256 // MICRO_BATCH,
        num_generations=8,
        max_completion_length=args.response,
        max_steps=NUM_STEPS,
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
            if found is not None:
                mismatch.append(float(found))

    trainer = trl.GRPOTrainer(
        model=args.model,
        reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        args=settings,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(args.model),
        callbacks=[Clock()],
    )
    trainer.train()
    name = f"TRL {trl.__version__}, vLLM colocated, Liger loss, micro-batches of {MICRO_BATCH}"
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps({"name": name, "steps": steps[1:], "mismatch": mismatch, "peak_gib": peak}))


if __name__ == "__main__":
    main()

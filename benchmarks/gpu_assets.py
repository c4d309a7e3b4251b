"""A model with random weights in the shapes of a Qwen3, its tokenizer and prompts, for GPU figures.

Random weights are good enough to measure speed, memory and exactness, but not learning. Token ids
beyond the small tokenizer decode to nothing, so the text of a long answer is short too.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SHAPES = {  # hidden size, layers, query heads, MLP width; all have 8 key/value heads of 128
    "0.6B": (1024, 28, 16, 3072),
    "1.7B": (2048, 28, 16, 6144),
    "4B": (2560, 36, 32, 9728),
}
QWEN3 = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}
NUM_PROMPTS = 512
PROMPT_DIGITS = 144  # one token each
PROMPT_TOKENS = PROMPT_DIGITS + 6  # the chat template adds 6
LONG_TAIL_MEAN, LONG_TAIL_SIGMA = 1024, 1.0  # of a log-normal distribution, before the cut


def described(shape: str) -> dict[str, Any]:
    """`config.json` of a Qwen3 of this shape."""
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return QWEN3 | dict(zip(sizes, SHAPES[shape], strict=True))


def visible_gpus() -> list[str]:
    """Numbers or names of the GPUs that this process may use, as in CUDA_VISIBLE_DEVICES."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]


def write_model(folder: Path, shape: str) -> Path:
    """Writes an HF folder: config, tokenizer, bfloat16 weights drawn on the GPU if there is one.

    This runs in its own process, because torch does not return GPU memory.
    """
    if not (folder / "tokenizer_config.json").exists():
        subprocess.run([sys.executable, __file__, str(folder), shape], check=True)
    return folder


def random_model(shape: str, *, seed: int = 0, **special: int) -> Any:
    """A Hugging Face model with bfloat16 weights, drawn on the GPU if there is one.

    special  ids of special tokens, named as in config.json
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**{**described(shape), "bos_token_id": None, **special})
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return Qwen3ForCausalLM(config).to(torch.bfloat16)


def _write_model(folder: Path, shape: str) -> None:
    from scripts.quickstart.model import make_tokenizer

    tokenizer = make_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
    model = random_model(shape, **ids)
    model.save_pretrained(folder)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def write_prompts(path: Path, *, seed: int = 0) -> Path:
    rng = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as out:
        for _ in range(NUM_PROMPTS):
            question = "".join(rng.choice("0123456789") for _ in range(PROMPT_DIGITS))
            line = {"prompt": [{"role": "user", "content": question}], "label": "0"}
            out.write(json.dumps(line) + "\n")
    return path


def length_of(index: int, longest: int) -> int:
    """The response length of sample number `index`, the same in every run."""
    mu = math.log(LONG_TAIL_MEAN) - LONG_TAIL_SIGMA**2 / 2
    drawn = random.Random(index).lognormvariate(mu, LONG_TAIL_SIGMA)
    return max(1, min(longest, round(drawn)))


async def long_tail(args: Any, sample: Any, sampling_params: dict[str, Any]) -> Any:
    """--custom-generate-function-path: a model that never stops gets lengths of a trained one."""
    from vime.rollout.generation import generate

    count = length_of(sample.index, sampling_params["max_tokens"])
    return await generate(args, sample, sampling_params | {"max_tokens": count, "ignore_eos": True})


if __name__ == "__main__":
    _write_model(Path(sys.argv[1]), sys.argv[2])

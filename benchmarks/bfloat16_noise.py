"""How far bfloat16 alone moves log-probabilities from float32, on random weights in Qwen3 shapes.

    python benchmarks/bfloat16_noise.py      two minutes on a CPU; 4B is drawn in float32, 16 GB

A Hugging Face model computes 96 random tokens twice with the same bfloat16 weights: in bfloat16 and
in float32. The figure is the mean |difference| of the log-probabilities, over tokens drawn from the
model's predictions. Compare `train/train_rollout_logprob_abs_diff` with this figure: trainer and
engine round differently, so they cannot agree more closely. Writes
benchmarks/results/bfloat16_noise_SHAPE.json.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_assets import random_model  # noqa: E402
from benchmarks.records import RESULTS, save, versions  # noqa: E402

TOKENS, DRAWN = 96, 8
QUARTILES = torch.tensor([0.25, 0.75])
COLUMNS = 8192  # columns of the vocabulary that are in float32 at a time


def main() -> int:
    for shape in ("0.6B", "4B"):
        model = random_model(shape).cpu()
        torch.manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (1, TOKENS))
        rounded, exact = (log_probs(model, ids, t) for t in (torch.bfloat16, torch.float32))
        drawn = torch.multinomial(exact.exp(), DRAWN)
        apart = (rounded.gather(1, drawn) - exact.gather(1, drawn)).abs()
        entropy = float(-(exact.exp() * exact).sum(-1).mean())
        print(f"{shape}: {apart.mean():.4f} nats apart on average; entropy {entropy:.2f}")
        record = {
            "name": f"bfloat16_noise_{shape.lower().replace('.', '_')}",
            "value": round(float(apart.mean()), 5),
            "unit": "nats, mean of |difference|",
            "peer": None,
            "spread": [round(float(x), 5) for x in apart.flatten().quantile(QUARTILES)],
            "entropy": round(entropy, 3),
            "device": "CPU",
            "versions": versions(("torch", "transformers")),
        }
        save(RESULTS / f"{record['name']}.json", record)
        del model
    return 0


@torch.no_grad()
def log_probs(model: Qwen3ForCausalLM, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, V] float32. At most one layer has a float32 copy at a time."""

    def as_asked(module: torch.nn.Module) -> torch.nn.Module:
        return module if dtype == torch.bfloat16 else copy.deepcopy(module).to(dtype)

    body = model.model
    hidden = body.embed_tokens(ids).to(dtype)
    positions = torch.arange(TOKENS)[None]
    angles = body.rotary_emb(hidden, positions)
    mask = torch.full((TOKENS, TOKENS), float("-inf"), dtype=dtype).triu(1)[None, None]
    for layer in body.layers:
        hidden = as_asked(layer)(
            hidden, attention_mask=mask, position_embeddings=angles, position_ids=positions
        )
    hidden = as_asked(body.norm)(hidden)
    matrix = model.lm_head.weight
    parts = [hidden @ part.to(dtype).T for part in matrix.split(COLUMNS)]
    return torch.cat(parts, -1)[0].float().log_softmax(-1)


if __name__ == "__main__":
    sys.exit(main())

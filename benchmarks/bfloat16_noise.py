"""How far bfloat16 alone takes log-probabilities from float32, on random weights in Qwen3 shapes.

    python benchmarks/bfloat16_noise.py      two minutes on a CPU; 4B is drawn in float32, 16 GB

One model of Hugging Face's, its bfloat16 weights used in bfloat16 and in float32, on 96 random
tokens; the mean of |difference| over tokens drawn from what it predicts. The figure to hold
`train/train_rollout_logprob_abs_diff` of such weights against: trainer and engine round
differently, and cannot be closer than that. Writes benchmarks/results/bfloat16_noise_SHAPE.json.
"""

from __future__ import annotations

import copy
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_assets import random_model  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
TOKENS, DRAWN = 96, 8
QUARTILES = torch.tensor([0.25, 0.75])
COLUMNS = 8192  # of the vocabulary in float32 at a time


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
            "versions": {p: version(p) for p in ("torch", "transformers")},
        }
        (RESULTS / f"{record['name']}.json").write_text(json.dumps(record, indent=2) + "\n")
        del model
    return 0


@torch.no_grad()
def log_probs(model: Qwen3ForCausalLM, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, V] float32. A float32 copy exists of one layer at a time."""

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

"""A running vLLM engine of each family gets weights from a Megatron trainer; both against HF.

The engine starts from one random model and the trainer from another of the same shape. So the
engine's samples can follow the second model only after a real weight update.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import torch
from model_families import make_model
from ranks import run_ranks
from tiny import make_config
from training import hf_model

from tests.tiny_families import TINY_MODELS
from vime.backends.megatron.hf.registry import architecture

# Shapes for which vLLM has attention kernels on a CPU.
_HEADS = {"hidden_size": 128, "head_dim": 32, "max_position_embeddings": 128}
_LATENT = {
    "hidden_size": 128,
    "max_position_embeddings": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
}
PROMPTS = ([5, 17, 23, 42, 8, 61], [3, 3, 90, 12], [77, 1, 2, 50, 50, 31, 9, 14, 66])
NUM_TOKENS = 24


@dataclass(frozen=True, slots=True)
class LiveFinding:
    """Largest differences of a sampled token's log-probability from Hugging Face's."""

    before: float  # the weights that the engine started from
    stale: float  # the same samples under the trainer's weights; the update must close this gap
    after: float  # the trainer's weights, once sent

    @property
    def is_good(self) -> bool:
        return max(self.before, self.after) < 1e-4 and self.stale > 0.01


def shape_for_engine(model: str) -> dict[str, Any]:
    shape = TINY_MODELS[model]
    if not architecture(shape)["multi_latent_attention"]:
        return dict(_HEADS)
    rope = shape.get("rope_parameters")
    if rope is None:
        return dict(_LATENT)
    # vLLM tabulates factor x original positions
    return _LATENT | {"rope_parameters": rope | {"original_max_position_embeddings": 32}}


def examine_live(root: Path, model: str) -> LiveFinding:
    """One engine start: 20 to 45 s on two cores."""
    from scripts.quickstart.model import make_tokenizer
    from vime.backends.vllm.engine import VLLMEngine

    first, second = root / "first", root / "second"
    for seed, folder in enumerate((first, second)):
        make_model(folder, model, seed=seed, **shape_for_engine(model))
        make_tokenizer().save_pretrained(folder)  # vLLM needs one; its content does not matter
    cfg = config_of(first, root)
    engine = VLLMEngine(cfg, 0, [0])
    url = engine.start()
    try:
        old = [sample(url, prompt) for prompt in PROMPTS]
        run_ranks(send, 1, url=url, second=second, run_dir=root, timeout_s=120.0)
        new = [sample(url, prompt) for prompt in PROMPTS]
    finally:
        engine.stop()
    return LiveFinding(apart(first, old), apart(second, old), apart(second, new))


def config_of(folder: Path, run_dir: Path) -> Any:
    return make_config(
        folder,
        cluster={"actor_gpus_per_node": 1, "colocate": True},
        log={"run_dir": str(run_dir)},
        engine={"update_weight_buffer_size": 200_000, "check_weight_update_equal": True},
    )


def send(rank: int, world: int, port: int, url: str, second: Path, run_dir: Path) -> None:
    from vime.backends.megatron.trainer import MegatronTrainer

    trainer = MegatronTrainer(config_of(second, run_dir), rank, world, rank, "127.0.0.1", port)
    trainer.connect_engines([url])
    trainer.update_weights(version=1)
    trainer.close()


def sample(url: str, prompt: list[int]) -> tuple[list[int], list[int], list[float]]:
    """(prompt, sampled tokens, their log-probabilities as the engine gives them)"""
    params = {"temperature": 1.0, "max_tokens": NUM_TOKENS, "ignore_eos": True, "logprobs": 0}
    body = {"token_ids": prompt, "sampling_params": params | {"detokenize": False, "seed": 1}}
    response = requests.post(f"{url}/inference/v1/generate", json=body, timeout=120)
    assert response.ok, response.text
    choice = response.json()["choices"][0]
    logps = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    return prompt, choice["token_ids"], logps


def apart(folder: Path, samples: list[tuple[list[int], list[int], list[float]]]) -> float:
    model, worst = hf_model(folder), 0.0
    for prompt, answer, logps in samples:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        wanted = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
        worst = max(worst, float((wanted - torch.tensor(logps)).abs().max()))
    return worst

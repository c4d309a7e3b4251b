"""A tiny random model of every family, compared with Hugging Face in every layout."""

from __future__ import annotations

import filecmp
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ranks import agree_on_port
from safetensors.torch import load_file
from test_megatron_model import packed_logits, sequences
from tiny import make_config
from training import hf_logps, hf_model, named_gradients, samples_of

from tests.tiny_families import TINY_MODELS
from vime.backends.megatron.hf.registry import architecture

LAYOUTS: dict[str, dict[str, Any]] = {
    "1 rank": {},
    "TP2+SP": {"tp": 2, "sequence_parallel": True},
    "PP2": {"pp": 2},
    "CP2": {"cp": 2},
    "EP2": {"ep": 2},
    "EP2+TP2+SP": {"ep": 2, "tp": 2, "sequence_parallel": True},
}


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one model in one layout."""

    logits: float | None  # largest absolute difference; None on a rank without logits
    gradient: float  # largest difference of a tensor, relative to that tensor's largest entry
    round_trip: bool  # the exported files have the bytes of the originals


def cases(num_ranks: int) -> list[tuple[str, str]]:
    """[(model, layout)] that `num_ranks` ranks can run."""
    with_experts = [
        model for model in TINY_MODELS if architecture(TINY_MODELS[model]).get("num_experts")
    ]
    return [
        (model, layout)
        for layout in LAYOUTS
        for model in TINY_MODELS
        if ("1" in layout) == (num_ranks == 1) and ("EP" not in layout or model in with_experts)
    ]


def make_model(folder: Path, model: str, *, seed: int = 0, **other_shape: Any) -> None:
    """The HF folder of a random model."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(**TINY_MODELS[model] | other_shape)
    made = transformers.AutoModelForCausalLM.from_config(config)
    tensors = [*made.named_parameters(), *made.named_buffers()]
    with torch.no_grad():
        for name, t in tensors:
            if "norm" in name:
                t.copy_(1 + 0.1 * torch.randn_like(t))
            elif "inv_freq" not in name:
                t.copy_(0.08 * torch.randn_like(t))
    made.save_pretrained(folder)


def write_model(folder: Path, model: str) -> None:
    """The HF folder, with HF's own logits and gradient of the test data beside it."""
    make_model(folder, model)
    plain = hf_model(folder)
    with torch.no_grad():
        torch.save(
            torch.cat([plain(ids[None]).logits[0] for ids in sequences()]), logits_of(folder)
        )
    for seq in batch_of(config_of(folder, 1, {})).sequences:
        logp, _ = hf_logps(plain, seq, 1.0)
        (-(torch.as_tensor(seq.weight) * logp).sum()).backward()
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    plain.save_pretrained(gradient_of(folder))


def logits_of(folder: Path) -> Path:
    return folder.with_suffix(".logits")


def gradient_of(folder: Path) -> Path:
    return folder.with_suffix(".gradient")


def config_of(folder: Path, world: int, parallel: dict[str, Any]) -> Any:
    return make_config(
        folder,
        cluster={"actor_gpus_per_node": world},
        parallel=parallel,
        batch={"prompts": 2, "samples_per_prompt": 2, "num_rollout": 1, "micro_batch_size": 2},
        algorithm={"loss_type": "sft_loss"},
        optimizer={"clip_grad": 0.0},
    )


def batch_of(cfg: Any) -> Any:
    from vime.data.batching import build_train_batch

    return build_train_batch(samples_of(2, 2), cfg, 0)


def examine(
    rank: int, world: int, port: int, root: Path, cases: list[tuple[str, str]]
) -> list[Finding]:
    from vime.backends.megatron.trainer import MegatronTrainer

    findings = []
    for model, layout in cases:
        print(model, layout, flush=True)
        folder = root / model
        cfg = config_of(folder, world, LAYOUTS[layout])
        own_port = agree_on_port(root, f"{model} {layout}", rank)
        trainer = MegatronTrainer(cfg, rank, world, rank, "127.0.0.1", own_port)
        with torch.no_grad():
            logits = packed_logits(cfg, trainer.actor.chunks)
        worst = None
        if logits is not None:
            worst = float((logits - torch.load(logits_of(folder))).abs().max())
        copy = root / f"{model} {layout}"
        trainer.save_hf(str(copy))
        names = [p.name for p in folder.iterdir()]
        exact = len(names) > 1 and not any(filecmp.cmpfiles(folder, copy, names, shallow=False)[1:])
        trainer.train(batch_of(cfg))
        expected = load_file(gradient_of(folder) / "model.safetensors")
        found = named_gradients(trainer.actor)
        of_parameters = {n for n in found if not n.endswith("e_score_correction_bias")}
        assert of_parameters == {n for n in expected if not n.endswith("e_score_correction_bias")}
        off = max(
            float((found[n] - expected[n]).abs().max() / expected[n].abs().max().clamp(min=1e-12))
            for n in of_parameters
        )
        findings.append(Finding(worst, off, exact))
        trainer.close()
    return findings

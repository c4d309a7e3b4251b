"""Only the weights chosen by name train, in layouts that hold them on different ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import agree_on_port, run_ranks
from tiny import make_config, write_tiny_hf
from training import named_weights, samples_of

from vime.config.sections.model import OptimizerConfig
from vime.errors import CheckpointError, ConfigError

RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
_MLP = ("gate", "up", "down")
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"pp": 2}, {"freeze_names": ["word_embeddings", r"layers\.[12]\."]}),
    ({"pp": 2}, {"train_names": [r"layers\.0\.mlp"]}),  # nothing on the last stage
    ({"pp": 2}, {"train_names": [r"layers\.3\.mlp"]}),  # nothing on the first
    ({"use_distributed_optimizer": True}, {"train_names": [r"layers\.3\.", "final_layernorm"]}),
    ({"tp": 2, "sequence_parallel": True}, {"freeze_names": ["linear_qkv"]}),
    ({"tp": 2} | RECOMPUTE, {"train_names": ["norm"]}),  # the embedding is frozen
]


def train(rank: int, world: int, port: int, folder: Path) -> tuple[list[set[str]], list[str]]:
    """For each case the HF names of the weights that changed; then the messages of errors.

    Also checks that a resumed run takes the same second step as an undisturbed one.
    """
    from vime.backends.megatron.model.build import build_model
    from vime.backends.megatron.trainer import MegatronTrainer
    from vime.data.batching import build_train_batch

    changed, said = [], []
    for number, (parallel, optimizer) in enumerate(CASES):
        saved = str(folder / f"saved {number}")
        cfg = make_config(
            folder,
            cluster={"actor_gpus_per_node": world},
            parallel=parallel,
            batch={"prompts": 2, "samples_per_prompt": 2, "num_rollout": 2},
            algorithm={"loss_type": "sft_loss"},
            optimizer={"lr": 1e-3, "clip_grad": 0.0} | optimizer,
            checkpoint={"save": saved, "load": saved},
        )

        def trainer(cfg: Any, name: str) -> MegatronTrainer:
            port = agree_on_port(folder, name, rank)
            return MegatronTrainer(cfg, rank, world, rank, "127.0.0.1", port)

        t = trainer(cfg, f"{number}")
        before = named_weights(t.actor)
        batch = build_train_batch(samples_of(2, 2), cfg, 0)
        t.train(batch)
        after = named_weights(t.actor)
        changed.append({n for n in before if not torch.equal(before[n], after[n])})
        t.save(0)
        t.train(batch)
        straight = named_weights(t.actor)
        try:
            build_model(replace(cfg, optimizer=OptimizerConfig(freeze_names=["no_such"])))
        except ConfigError as error:
            said.append(str(error))
        t.close()
        t = trainer(cfg, f"{number} again")
        t.train(batch)
        resumed = named_weights(t.actor)
        assert all(torch.equal(w, resumed[n]) for n, w in straight.items()), (parallel, optimizer)
        t.close()
    try:
        trainer(replace(cfg, optimizer=OptimizerConfig()), "all")
    except CheckpointError as error:
        said.append(str(error))
    return changed, said


def test_only_the_chosen_weights_train(tmp_path: Path) -> None:
    folder = write_tiny_hf(tmp_path / "hf", tied=True)
    for changed, said in run_ranks(train, 2, folder=folder, timeout_s=240.0):
        frozen, first_mlp, last_mlp, last, no_qkv, norms = changed
        assert not [n for n in frozen if "embed" in n or "layers.1." in n or "layers.2." in n]
        assert {"model.norm.weight", "model.layers.3.mlp.up_proj.weight"} <= frozen
        for number, mlp in ((0, first_mlp), (3, last_mlp)):
            assert mlp == {f"model.layers.{number}.mlp.{x}_proj.weight" for x in _MLP}
        assert len(last) == 12
        assert all("layers.3." in n or n == "model.norm.weight" for n in last)
        assert "model.embed_tokens.weight" in no_qkv
        assert not [n for n in no_qkv if ".q_proj" in n or ".k_proj" in n or ".v_proj" in n]
        # each of 4 layers has two in the stream, two of queries and keys; then the final norm
        assert len(norms) == 4 * 4 + 1
        assert all("norm" in n for n in norms)
        for words in ("--freeze-params-name-list no_such matches no weight", "word_embeddings"):
            assert words in said[0]
        assert len(said) == len(CASES) + 1
        trained = "its optimizer trained with --only-train-params-name-list norm"
        assert (
            f"{trained}, this run has no weight frozen. Give the same flag, or --no-load"
            in said[-1]
        )


def train_one_expert(rank: int, world: int, port: int, folder: Path) -> set[str]:
    from vime.backends.megatron.trainer import MegatronTrainer
    from vime.data.batching import build_train_batch

    cfg = make_config(
        folder,
        cluster={"actor_gpus_per_node": world},
        parallel={"ep": 2},
        batch={"prompts": 2, "samples_per_prompt": 2},
        algorithm={"loss_type": "sft_loss"},
        optimizer={"lr": 1e-3, "train_names": [r"layers\.1\..*local_experts\.0\."]},
    )
    t = MegatronTrainer(cfg, rank, world, rank, "127.0.0.1", port)
    before = named_weights(t.actor)
    t.train(build_train_batch(samples_of(2, 2), cfg, 0))
    after = named_weights(t.actor)
    t.close()
    return {n for n in before if not torch.equal(before[n], after[n])}


def test_an_expert_trains_although_those_of_other_ranks_are_frozen(tmp_path: Path) -> None:
    """A rank whose experts are frozen must still take part in the exchange of gradients."""
    folder = write_tiny_hf(tmp_path / "hf", moe=True, num_hidden_layers=2)
    for changed in run_ranks(train_one_expert, 2, folder=folder, timeout_s=90.0):
        assert changed == {f"model.layers.1.mlp.experts.0.{x}_proj.weight" for x in _MLP}


def test_patterns_are_checked_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        make_config("hf", optimizer={"freeze_names": ["a"], "train_names": ["b"]})
    with pytest.raises(ConfigError, match="not a regular expression"):
        make_config("hf", optimizer={"train_names": ["("]})

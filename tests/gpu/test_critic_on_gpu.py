"""PPO on a GPU: bfloat16 with a float32 value head, offloaded between rollouts, resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import free_port, run_ranks
from tiny import make_config, write_tiny_hf
from training import samples_of

from vime.data.batching import build_train_batch


@pytest.mark.parametrize("sharded", [False, True], ids=["", "distributed optimizer"])
def test_actor_and_critic_leave_the_gpu_train_on_and_resume(sharded: bool, tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 320, "head_dim": 64, "tied": True}
    folder = write_tiny_hf(tmp_path / "hf", **shape)
    (found,) = run_ranks(train, 1, folder=folder, sharded=sharded)
    assert found["head"] == torch.float32
    assert found["trunk"] == torch.bfloat16
    assert found["freed"] > 0.9 * found["held"]
    losses = found["losses"]
    assert losses[0] == pytest.approx(0.25)  # half the rewards' mean square: all values are 0
    assert losses[-1] < 0.9 * losses[0]
    assert found["away"] == found["home"]
    assert found["resumed"] == (True, True)
    used, rest = found["used"], "perf/memory_beside_engines_gib"
    assert rest not in found["used_before"]
    assert 0 < used["perf/max_memory_allocated_gib"] <= used["perf/max_memory_reserved_gib"]
    assert used[rest] < used["perf/max_memory_reserved_gib"]


def train(rank: int, world: int, port: int, folder: Path, sharded: bool) -> dict[str, Any]:
    from vime.backends.megatron.chunks import unwrap
    from vime.backends.megatron.trainer import MegatronTrainer
    from vime.backends.megatron.training.rollout_columns import RolloutColumns

    cfg = make_config(
        folder,
        parallel={"use_distributed_optimizer": sharded},
        batch={
            "prompts": 4,
            "samples_per_prompt": 4,
            "dynamic": True,
            "max_tokens_per_gpu": 256,
            "num_rollout": 9,
        },
        algorithm={"advantage_estimator": "ppo", "value_clip": 9.0},
        optimizer={"lr": 1e-4, "critic_lr": 1e-3},
        checkpoint={"load": f"{folder}-saved", "save": f"{folder}-saved"},
    )
    trainer = MegatronTrainer(cfg, master_port=free_port())
    batch = build_train_batch(samples_of(4, 4), cfg, 0)

    def values() -> list[float]:
        columns = RolloutColumns(batch, cfg, trainer.device)
        return trainer.critic.values(columns, list(batch.steps)).tolist()

    figures = [trainer.train(batch) for _ in range(5)]
    losses, used_before = [f["train/value_loss"] for f in figures], figures[0]
    away = values()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    trainer.offload(keep_weights=True)
    trainer.offload(keep_weights=False)
    freed = before - torch.cuda.memory_allocated()
    held = trainer.offloaded.num_bytes
    trainer.onload()
    home = values()
    used = trainer.train(batch)
    losses.append(used["train/value_loss"])
    trainer.save(0)
    saved = values()
    straight = trainer.train(batch)["train/critic_grad_norm"]
    trainer.close()
    trainer = MegatronTrainer(cfg, master_port=free_port())
    resumed = values() == saved, trainer.train(batch)["train/critic_grad_norm"] == straight
    critic = unwrap(trainer.critic.chunks[0])
    trainer.close()
    return {
        "losses": losses,
        "away": away,
        "home": home,
        "held": held,
        "resumed": resumed,
        "freed": freed,
        "used": used,
        "used_before": used_before,
        "head": critic.output_layer.weight.dtype,
        "trunk": critic.embedding.word_embeddings.weight.dtype,
    }

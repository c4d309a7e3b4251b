"""Two steps of PPO in every layout, actor and critic, compared with plain autograd in float64.

The reward has a KL penalty; the batch has a removed sample and a partial mask. In the second step
values differ from the old ones, so value clipping acts. Each layout saves. The next layout with the
same kind of optimizer continues from that checkpoint and must hold the same critic.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import agree_on_port, run_ranks
from tiny import make_config, write_tiny_hf
from training import hf_logps, hf_model, named_gradients, samples_of

from vime.data.batching import build_train_batch

GAMMA, LAMBDA, KL, CLIP, VALUE_CLIP = 0.97, 0.9, 0.05, 0.01, 0.003
ADAM = {"lr": 1e-3, "critic_lr": 5e-3, "beta1": 0.9, "beta2": 0.98, "eps": 1e-2}
SHARDED = {"use_distributed_optimizer": True}
TP2 = {"tp": 2, "sequence_parallel": True}
LAYOUTS: list[dict[str, Any]] = [{}, TP2, {"pp": 2}, {"cp": 2}, SHARDED, SHARDED | TP2]


def config(root: Path, parallel: dict[str, Any], load: Path | None = None) -> Any:
    return make_config(
        root / "actor",
        cluster={"actor_gpus_per_node": 2},
        parallel=parallel,
        batch={
            "prompts": 2,
            "samples_per_prompt": 4,
            "steps_asked": 2,
            "num_rollout": 9,
            "dynamic": True,
            "max_tokens_per_gpu": 60,
        },
        algorithm={
            "advantage_estimator": "ppo",
            "gamma": GAMMA,
            "lambd": LAMBDA,
            "kl_coef": KL,
            "clip_low": CLIP,
            "value_clip": VALUE_CLIP,
        },
        checkpoint={"ref_load": str(root / "reference"), "load": str(load or root / "actor")},
        optimizer=ADAM | {"weight_decay": 0.0, "clip_grad": 0.0},
    )


def batch_of(cfg: Any) -> Any:
    groups = samples_of(2, 4)
    groups[0][1].remove_sample = True
    groups[1][3].loss_mask = [i % 2 for i in range(groups[1][3].response_length)]
    return build_train_batch(groups, cfg, 0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("critic")
    write_tiny_hf(root / "actor", tied=True, num_hidden_layers=2)
    reference = hf_model(root / "actor")
    torch.manual_seed(5)
    torch.save(0.1 * torch.randn(1, 64), root / "head.pt")
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.01 * torch.randn_like(p))
    reference.save_pretrained(root / "reference")
    return root


def values_of(critic: Any, head: torch.Tensor, s: Any) -> torch.Tensor:
    """The value of the state before each response token, [R]."""
    hidden = critic.model(torch.as_tensor(s.tokens)[None]).last_hidden_state[0]
    return (hidden @ head[0])[-s.response_length - 1 : -1]


def by_autograd(root: Path) -> dict[str, Any]:
    """GAE as a sum, PPO's clip and the clipped squared error, over the loss tokens."""
    cfg = config(root, {})
    batch = batch_of(cfg)
    actor, reference = (hf_model(root / n).double() for n in ("actor", "reference"))
    critic = copy.deepcopy(actor)
    head = torch.load(root / "head.pt").double().requires_grad_()
    known: dict[int, tuple] = {}
    with torch.no_grad():
        for p, s in enumerate(batch.sequences):
            on = torch.as_tensor(s.loss_mask) > 0
            old, ref = hf_logps(actor, s, 1.0)[0][on], hf_logps(reference, s, 1.0)[0][on]
            value, reward = values_of(critic, head, s)[on], -KL * (old - ref)
            if len(reward) == 0:
                continue
            reward[-1] += s.raw_reward
            delta = reward + GAMMA * torch.cat([value[1:], torch.zeros(1)]) - value
            powers = (GAMMA * LAMBDA) ** torch.arange(len(delta)).double()
            adv = torch.stack(
                [(powers[: len(delta) - t] * delta[t:]).sum() for t in range(len(delta))]
            )
            known[p] = on, old, value, adv, adv + value
    models = {"actor": [*actor.parameters()], "critic": [*critic.model.parameters(), head]}
    adam = {
        name: torch.optim.AdamW(
            params, ADAM[lr], (ADAM["beta1"], ADAM["beta2"]), ADAM["eps"], weight_decay=0
        )
        for (name, params), lr in zip(models.items(), ("lr", "critic_lr"), strict=True)
    }
    losses: dict[str, list[float]] = {"actor": [], "critic": []}
    for plan in batch.steps:
        members = sorted(p for b in plan.micro_batches[0] + plan.micro_batches[1] for p in b)
        total = {"actor": torch.zeros(()).double(), "critic": torch.zeros(()).double()}
        for p in members:
            if p not in known:
                continue
            on, old, value, adv, target = known[p]
            ratio = (hf_logps(actor, batch.sequences[p], 1.0)[0][on] - old).exp()
            clipped = torch.minimum(ratio * adv, ratio.clamp(1 - CLIP, 1 + CLIP) * adv)
            total["actor"] = total["actor"] - clipped.mean() / len(members)
            now = values_of(critic, head, batch.sequences[p])[on]
            held = value + (now - value).clamp(-VALUE_CLIP, VALUE_CLIP)
            worse = torch.maximum((now - target) ** 2, (held - target) ** 2)
            total["critic"] = total["critic"] + worse.mean() / 2 / len(members)
        for name, loss in total.items():
            adam[name].zero_grad()
            loss.backward()
            adam[name].step()
            losses[name].append(loss.item())
    named = {"actor": actor, "critic": critic}
    return {
        "loss": {name: sum(x) / len(x) for name, x in losses.items()},
        "head": (head.grad, head.detach()),
    } | {
        name: {n: (p.grad, p.detach()) for n, p in m.named_parameters() if n != "lm_head.weight"}
        for name, m in named.items()
    }


def train(rank: int, world: int, port: int, root: Path) -> list[dict]:
    from vime.backends.megatron.chunks import unwrap
    from vime.backends.megatron.trainer import MegatronTrainer
    from vime.backends.megatron.weights.export import export_hf

    def head_of(critic: Any) -> torch.nn.Parameter | None:
        last = unwrap(critic.chunks[-1])
        return last.output_layer.weight if last.post_process else None

    def weights_of(model: Any) -> dict[str, torch.Tensor]:
        found = {n: t.clone() for n, t in export_hf(model.chunks, model.cfg)}
        head = head_of(trainer.critic)
        return found if head is None else found | {"head": head.detach().clone()}

    results = []
    saved = None
    for number, parallel in enumerate(LAYOUTS):
        is_sharded = parallel.get("use_distributed_optimizer")
        if saved is not None and parallel is not SHARDED:
            cfg = config(root, parallel, saved)
            own_port = agree_on_port(root, f"turn {number}, loaded", rank)
            trainer = MegatronTrainer(cfg, rank, world, rank, "127.0.0.1", own_port)
            results[-1]["loaded"] = weights_of(trainer.critic)
            results[-1]["start"] = trainer.start_rollout_id, trainer.critic.scheduler.num_steps
            trainer.close()
        cfg = config(root, parallel)
        own_port = agree_on_port(root, f"turn {number}", rank)
        trainer = MegatronTrainer(cfg, rank, world, rank, "127.0.0.1", own_port)
        head = head_of(trainer.critic)
        if head is not None:
            head.data.copy_(torch.load(root / "head.pt"))
        trainer.critic.optimizer.reload_model_params()
        metrics = trainer.train(batch_of(cfg))
        found = {"metrics": metrics, "critic": weights_of(trainer.critic)}
        if not is_sharded:
            found["gradients"] = {
                "actor": named_gradients(trainer.actor),
                "critic": named_gradients(trainer.critic),
                "head": None if head is None else head.main_grad.clone(),
            }
        saved = root / f"saved{number}"
        save(trainer, saved)
        results.append(found)
        trainer.close()
    return results


def save(trainer: Any, folder: Path) -> None:
    from vime.backends.megatron.checkpoints.save import save_checkpoint

    state = (trainer.actor.chunks, trainer.actor.optimizer, trainer.actor.scheduler)
    save_checkpoint(trainer.cfg, folder, 0, *state, critic=trainer.critic)


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_actor_and_critic_equal_plain_autograd_in_every_layout(root: Path) -> None:
    wanted = by_autograd(root)
    ranks = run_ranks(train, 2, root=root)
    for rank in ranks:
        for parallel, found in zip(LAYOUTS, rank, strict=True):
            m = found["metrics"]
            assert m["train/loss"] == pytest.approx(wanted["loss"]["actor"], rel=1e-6), parallel
            assert m["train/value_loss"] == pytest.approx(wanted["loss"]["critic"], rel=1e-6)
            assert 0 < m["train/value_clipfrac"] < 1
            for name, tensor in found["critic"].items():
                after = wanted["head"] if name == "head" else wanted["critic"][name]
                assert apart(tensor, after[1]) < 1e-5, (parallel, name)
            if "use_distributed_optimizer" in parallel:  # sharded: only weights can be compared
                continue
            for model in ("actor", "critic"):
                assert found["gradients"][model]
                for name, tensor in found["gradients"][model].items():
                    assert apart(tensor, wanted[model][name][0]) < 1e-5, (parallel, model, name)
    for number, parallel in enumerate(LAYOUTS):
        parts = [rank[number] for rank in ranks]
        heads = [part["critic"]["head"] for part in parts if "head" in part["critic"]]
        assert len(heads) == (1 if "pp" in parallel else 2), "the last stage has the value head"
        if "use_distributed_optimizer" not in parallel:
            gradients = [part["gradients"]["head"] for part in parts]
            gradients = [gradient for gradient in gradients if gradient is not None]
            assert len(gradients) == len(heads)
            for gradient in gradients:
                assert apart(gradient, wanted["head"][0]) < 1e-5, parallel
    for rank in ranks:
        continued = [found for found in rank if "loaded" in found]
        assert len(continued) == len(LAYOUTS) - 2, "all that another of its kind follows"
        for found in continued:
            assert found["start"] == (1, 2)
            same = found["loaded"].keys() & found["critic"].keys()
            assert same >= wanted["critic"].keys()
            for name in same:
                assert torch.equal(found["loaded"][name], found["critic"][name]), name

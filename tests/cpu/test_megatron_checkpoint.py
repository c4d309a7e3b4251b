"""Checkpoints in Megatron's format: any layout loads any other and takes the same next step."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny import make_config, write_tiny_hf

from vime.backends.megatron.checkpoints.commit import TRACKER, commit_checkpoint
from vime.backends.megatron.checkpoints.start import resolve
from vime.backends.megatron.weights.export import export_hf
from vime.backends.megatron.weights.folder import save_hf
from vime.backends.megatron.weights.load import load_hf_weights
from vime.errors import CheckpointError

TP2 = {"tp": 2, "sequence_parallel": True}
PP2 = {"pp": 2}
VPP2 = {"pp": 2, "vpp": 2}
UNEVEN_PP2 = {"pp": 2, "last_stage_layers": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_gradients(write_tiny_hf(tmp_path_factory.mktemp("hf") / "model", tied=True))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("hf") / "mixture"
    write_tiny_hf(made, moe=True, num_hidden_layers=2)
    return with_gradients(made)


def with_gradients(made: Path) -> Path:
    """Adds a folder `gradients`, whose tensors have the names and shapes of the weights."""
    weights = load_file(made / "model.safetensors")
    g = torch.Generator().manual_seed(1)
    (made / "gradients").mkdir()
    gradients = {n: 0.01 * torch.randn(w.shape, generator=g) for n, w in weights.items()}
    save_file(gradients, made / "gradients" / "model.safetensors")
    return made


class Trainee:
    """Model, optimizer and scheduler in one layout; `step` applies the same gradient everywhere."""

    def __init__(self, folder: Path, parallel: dict, optimizer: str = "adam", **kw: Any) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        from vime.backends.megatron.model.build import build_model
        from vime.backends.megatron.parallel import initialize_groups

        shard = parallel.get("use_distributed_optimizer", False)
        self.folder = folder
        self.cfg = make_config(folder, parallel=parallel, checkpoint=kw)
        initialize_groups(self.cfg)
        self.bare = build_model(self.cfg)
        load_hf_weights(self.bare, folder, self.cfg)
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=shard
        )
        self.chunks = [DistributedDataParallel(c.config, ddp, c) for c in self.bare]
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer=optimizer,
                lr=1e-3,
                min_lr=0.0,
                weight_decay=0.01,
                clip_grad=0.0,
                use_distributed_optimizer=shard,
            ),
            self.chunks,
        )
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=1e-3,
            min_lr=0.0,
            lr_warmup_steps=2,
            lr_decay_steps=10,
            lr_decay_style="linear",
            start_wd=0.01,
            end_wd=0.01,
            wd_incr_steps=10,
            wd_incr_style="constant",
        )

    def step(self) -> None:
        parameters = [p for c in self.bare for p in c.parameters()]
        kept = [p.detach().clone() for p in parameters]
        load_hf_weights(self.bare, self.folder / "gradients", self.cfg)
        for p, before in zip(parameters, kept, strict=True):
            p.main_grad.copy_(p.data)
            p.data.copy_(before)
        self.optimizer.step()
        self.scheduler.step(1)

    def weights(self) -> dict[str, torch.Tensor]:
        return {n: t.clone() for n, t in export_hf(self.chunks, self.cfg)}

    def save(self, folder: str, iteration: int | None, **kw: Any) -> Path:
        from vime.backends.megatron.checkpoints.save import save_checkpoint

        args = (self.cfg, folder, iteration, self.chunks, self.optimizer, self.scheduler)
        return save_checkpoint(*args, {"rollout_id": iteration, "note": "kept"}, **kw)

    def load(self, folder: str, **kw: Any) -> tuple[int, dict]:
        from vime.backends.megatron.checkpoints.load import load_checkpoint

        start = resolve(folder, **kw)
        args = (self.cfg, start, self.chunks, self.optimizer, self.scheduler)
        return start.rollout_id, load_checkpoint(*args)


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    return [n for n in a if not torch.equal(a[n], b[n])]


def start_ranks(rank: int, world: int, port: int, folder: Path) -> None:
    from vime.backends.megatron.parallel import initialize_parallel

    initialize_parallel(make_config(folder), rank, world, rank, "127.0.0.1", port)


def save_and_load(
    rank: int, world: int, port: int, folder: Path, out: str, trips: list
) -> list[tuple]:
    """[(trip, weights that differ after loading, and after one more step, rollout, extra)]"""
    start_ranks(rank, world, port, folder)
    results = []
    for number, (optimizer, first, second) in enumerate(trips):
        here = Trainee(folder, first, optimizer)
        for _ in range(3):
            here.step()
        path = f"{out}/{number}"
        here.save(path, 4)
        torch.manual_seed(11)
        saved = here.weights()
        here.step()
        after = here.weights()
        other = Trainee(folder, second, optimizer)
        rollout, extra = other.load(path)
        at_once = differing(other.weights(), saved)
        other.step()
        later = differing(other.weights(), after)
        results.append(((optimizer, first, second), at_once, later, rollout, extra))
    return results


def test_a_checkpoint_loads_into_any_layout_and_updates_the_same(
    folder: Path, tmp_path: Path
) -> None:
    dist = {"use_distributed_optimizer": True}
    trips = [
        ("adam", TP2, PP2),
        ("adam", PP2, {}),
        ("adam", VPP2, TP2),
        ("adam", UNEVEN_PP2, PP2),
        ("sgd", {}, TP2),
        ("adam", dist, dist | TP2),
        ("adam", dist | TP2, dist | PP2),
        ("adam", dist | VPP2, dist),
        ("adam", dist | PP2, dist | TP2),
        ("adam", dist | TP2, dist | UNEVEN_PP2),
    ]
    ranks = run_ranks(save_and_load, 2, folder=folder, out=str(tmp_path), trips=trips)
    for result in ranks[0] + ranks[1]:
        assert result[1:] == ([], [], 5, {"rollout_id": 4, "note": "kept"}), result


def test_a_mixture_loads_with_other_expert_parallelism(mixture: Path, tmp_path: Path) -> None:
    dist, ep2 = {"use_distributed_optimizer": True}, {"ep": 2}
    trips = [
        ("adam", ep2, {}),
        ("adam", dist | ep2, dist),
        ("adam", dist, dist | ep2),
        ("adam", dist | ep2 | TP2, dist | PP2),
        ("adam", dist | TP2, dist | ep2),
    ]
    ranks = run_ranks(save_and_load, 2, folder=mixture, out=str(tmp_path), trips=trips)
    for result in ranks[0] + ranks[1]:
        assert result[1:] == ([], [], 5, {"rollout_id": 4, "note": "kept"}), result


def one_rank(rank: int, world: int, port: int, folder: Path, out: str) -> dict[str, Any]:
    """The cases of a single rank: damaged and missing files, RNG, release weights, dtypes."""
    from vime.backends.megatron.checkpoints.load import load_checkpoint
    from vime.backends.megatron.checkpoints.save import save_checkpoint

    start_ranks(rank, world, port, folder)
    here = Trainee(folder, {})
    here.step()
    whole = f"{out}/whole"
    Path(whole, "rollout").mkdir(parents=True)
    Path(whole, "rollout", "state_0.pt").write_bytes(b"data")
    saved = here.save(whole, 0)
    draw = torch.rand(3)
    here.step()
    here.save(whole, 1, commit=False)
    tracker = Path(whole, TRACKER)
    seen: dict[str, Any] = {"tracker": tracker.read_text(), "uncommitted": Path(whole).exists()}
    rollout, _ = here.load(whole)
    seen["rollout"], seen["rng"] = rollout, torch.equal(torch.rand(3), draw)
    seen["unfinished"] = failure(lambda: here.load(whole, ckpt_step=1))
    finished = f"{out}/finished"
    shutil.copytree(whole, finished)
    commit_checkpoint(finished, 1)
    commit_checkpoint(finished, 0)
    seen["chosen"] = here.load(finished, ckpt_step=1)[0]

    converted = f"{out}/converted"
    save_checkpoint(here.cfg, converted, None, here.chunks)
    fresh = Trainee(folder, {})
    start = resolve(f"{out}/nothing-here", converted)
    load_checkpoint(fresh.cfg, start, fresh.chunks, fresh.optimizer)
    seen["release"] = (start.rollout_id, differing(fresh.weights(), here.weights()))

    data = next(saved.glob("*.distcp"))
    damages = {
        "missing": lambda p: next(p.glob("*.distcp")).unlink(),
        "cut": lambda p: (p / data.name).write_bytes(data.read_bytes()[:-100]),
        "metadata": lambda p: (p / ".metadata").write_bytes(b"nonsense"),
        "common": lambda p: (p / "common.pt").write_bytes(bytes((p / "common.pt").stat().st_size)),
        "incomplete": lambda p: (p / "metadata.json").unlink(),
        "manifest": lambda p: (p / "manifest.json").write_bytes(b"nonsense"),
        "data cut": lambda p: (p.parent / "rollout" / "state_0.pt").write_bytes(b"dat"),
        "data gone": lambda p: (p.parent / "rollout" / "state_0.pt").unlink(),
        "gone": shutil.rmtree,
    }
    if not (saved / "common.pt").exists():  # megatron-core 0.19 stores it elsewhere
        del damages["common"]
    for name, damage in damages.items():
        copy = Path(out, name)
        shutil.copytree(whole, copy)
        damage(copy / "iter_0000000")
        seen[name] = failure(lambda copy=copy: here.load(str(copy)))
    tracker.write_text("soon")
    seen["garbled"] = failure(lambda: here.load(whole))
    wider = write_tiny_hf(f"{out}/wider", tied=True, intermediate_size=160)
    bigger = Trainee.__new__(Trainee)
    from vime.backends.megatron.checkpoints.streaming import StoredWeights
    from vime.backends.megatron.model.build import build_model

    bigger.cfg = make_config(wider)
    start = resolve(converted)
    seen["other model"] = failure(
        lambda: load_checkpoint(bigger.cfg, start, build_model(bigger.cfg))
    )
    turned = make_config(write_tiny_hf(f"{out}/turned", tied=True, rope_theta=5e6))
    seen["other angles"] = failure(lambda: load_checkpoint(turned, start, build_model(turned)))
    seen["other model, streamed"] = failure(
        lambda: StoredWeights(start, build_model(bigger.cfg)[0])
    )
    seen["other model's files"] = failure(
        lambda: load_hf_weights(build_model(bigger.cfg), folder, bigger.cfg)
    )
    half = make_config(folder, model={"dtype": "bfloat16"})
    chunks = build_model(half)
    load_checkpoint(half, start, chunks)
    exact = {n: t.bfloat16() for n, t in here.weights().items()}
    seen["bfloat16"] = differing(dict(export_hf(chunks, half)), exact)
    return seen


def full_disk(rank: int, world: int, port: int, folder: Path, out: str) -> dict[str, Any]:
    """Limits files to 40 kB in place of a full disk."""
    import resource

    start_ranks(rank, world, port, folder)
    here = Trainee(folder, {})
    here.step()
    here.save(out, 0)
    saved = here.weights()
    here.step()
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
    seen: dict[str, Any] = {
        "save": failure(lambda: here.save(out, 1)),
        "save_hf": failure(lambda: save_hf(here.chunks, here.cfg, f"{out}/hf")),
    }
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    seen["tracker"] = Path(out, TRACKER).read_text()
    seen["hf"] = sorted(p.name for p in Path(out, "hf").iterdir())
    seen["rollout"], _ = here.load(out)
    seen["differing"] = differing(here.weights(), saved)
    here.save(out, 1)
    seen["after"] = here.load(out)[0]
    return seen


def test_a_full_disk_leaves_the_previous_checkpoint_in_force(folder: Path, tmp_path: Path) -> None:
    (seen,) = run_ranks(full_disk, 1, folder=folder, out=str(tmp_path))
    for words in ("iter_0000001", "Free the disk", "File too large"):
        assert words in seen["save"]
    assert "Free the disk" in seen["save_hf"]
    assert seen["hf"] == [], "an incomplete folder has no config.json"
    assert (seen["tracker"], seen["rollout"], seen["differing"]) == ("0", 1, [])
    assert seen["after"] == 2


def save_into_a_folder_that_is_not_shared(
    rank: int, world: int, port: int, folder: Path, out: str
) -> dict[str, Any]:
    """Rank 1 writes its part of iteration 1 where rank 0 does not see it."""
    from vime.backends.megatron.checkpoints import torch_dist

    start_ranks(rank, world, port, folder)
    here = Trainee(folder, {**TP2, "use_distributed_optimizer": True})
    here.step()
    here.save(out, 0)
    here.step()
    real = torch_dist.save

    def save(state: Any, target: Path, fill: Any = None) -> None:
        real(state, target, fill)
        if rank == 1:
            (target / "__1_0.distcp").rename(Path(out, "elsewhere"))
        torch.distributed.barrier()

    torch_dist.save = save
    return {
        "save": failure(lambda: here.save(out, 1)),
        "tracker": Path(out, TRACKER).read_text(),
        "rollout": here.load(out)[0],
    }


def test_a_checkpoint_without_the_files_of_another_node_is_not_committed(
    folder: Path, tmp_path: Path
) -> None:
    for seen in run_ranks(
        save_into_a_folder_that_is_not_shared, 2, folder=folder, out=str(tmp_path)
    ):
        for words in ("iter_0000001/__1_0.distcp is missing", "must share --save"):
            assert words in seen["save"]
        assert (seen["tracker"], seen["rollout"]) == ("0", 1)


def save_behind_training(
    rank: int, world: int, port: int, folder: Path, out: str
) -> dict[str, Any]:
    """Delays the writing of iteration 1 while training continues; iteration 2 finds a full disk."""
    import resource
    import threading

    from vime.backends.megatron.checkpoints import torch_dist
    from vime.backends.megatron.checkpoints.async_save import BackgroundSaves

    start_ranks(rank, world, port, folder)
    here, saves = Trainee(folder, {**TP2, "use_distributed_optimizer": True}), BackgroundSaves()
    here.step()
    here.save(out, 0)
    saved, go = here.weights(), threading.Event()
    real = torch_dist.dcp.save
    torch_dist.dcp.save = lambda *args, **kw: (go.wait(60), real(*args, **kw))
    here.step()
    state = here.weights()
    here.save(out, 1, background=saves)
    here.step()  # changes the weights in place and runs collectives before anything is written
    after = here.weights()
    tracker = Path(out, TRACKER)
    seen: dict[str, Any] = {"early": tracker.read_text()}
    torch.distributed.barrier()
    seen["killed"] = (here.load(out)[0], differing(here.weights(), saved))
    go.set()
    saves.finish()
    seen["late"] = (tracker.read_text(), here.load(out)[0], differing(here.weights(), state))
    here.step()
    seen["next"] = differing(here.weights(), after)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    here.save(out, 2, background=saves)
    seen["full disk"] = failure(saves.finish)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    seen["still"] = tracker.read_text()
    return seen


def test_an_async_save_commits_the_state_of_its_beginning_after_all_is_on_disk(
    folder: Path, tmp_path: Path
) -> None:
    for seen in run_ranks(save_behind_training, 2, folder=folder, out=str(tmp_path)):
        assert (seen["early"], seen["killed"]) == ("0", (1, []))
        assert seen["late"] == ("1", 2, [])
        assert seen["next"] == [], "optimizer and scheduler were saved at the same moment"
        for words in ("iter_0000002", "stays in force", "File too large"):
            assert words in seen["full disk"]
        assert seen["still"] == "1"


def failure(action: Any) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_a_checkpoint_is_whole_or_its_error_names_the_file(folder: Path, tmp_path: Path) -> None:
    (seen,) = run_ranks(one_rank, 1, folder=folder, out=str(tmp_path))
    assert seen["tracker"] == "0", "a save without commit must not move the tracker"
    assert (seen["rollout"], seen["rng"], seen["chosen"]) == (1, True, 2)
    assert "iter_0000001 was not finished: its save was cut off" in seen["unfinished"]
    assert seen["release"] == (0, [])
    assert seen["bfloat16"] == []
    for name, words in {
        "missing": (".distcp is missing", "--ckpt-step"),
        "cut": (".distcp has", "cut off"),
        "metadata": (".metadata is damaged",),
        **({"common": ("common.pt is damaged",)} if "common" in seen else {}),
        "incomplete": ("metadata.json is missing",),
        "manifest": ("manifest.json is damaged", "--ckpt-step"),
        "data cut": ("state_0.pt has 3 bytes, not 4",),
        "data gone": ("state_0.pt is missing",),
        "gone": ("iter_0000000, which does not exist", "iter_0000001"),
        "garbled": ("latest_checkpointed_iteration.txt holds 'soon'",),
        "other model": ("release", "ffn_hidden_size 128, not 160", "--hf-checkpoint"),
        "other angles": ("release", "rotary_base 1000000, not 5000000", "--hf-checkpoint"),
        "other model, streamed": ("linear_fc", "stored as", "config.json"),
        "other model's files": ("model.safetensors", "[128, 64]", "[160, 64]", "config.json"),
    }.items():
        for word in words:
            assert word in seen[name], (name, seen[name])

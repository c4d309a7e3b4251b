"""The Megatron model against Hugging Face's: the same logits, and the same bytes on export."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import make_config, write_tiny_hf

from vime.backends.megatron.weights.folder import save_hf
from vime.backends.megatron.weights.load import load_hf_weights

LENGTHS = (8, 16, 4)  # one pack; each divisible by 2 * cp
LAYOUTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "1 rank": [("untied", {}), ("tied", {}), ("moe", {})],
    "2 ranks": [
        ("untied", {"tp": 2}),
        ("tied", {"tp": 2, "sequence_parallel": True}),
        ("untied", {"tp": 2, "sequence_parallel": True, "recompute_granularity": "full"}),
        ("untied", {"pp": 2}),
        ("tied", {"pp": 2}),
        ("untied", {"pp": 2, "first_stage_layers": 1}),
        ("untied", {"pp": 2, "vpp": 2}),
        ("untied", {"cp": 2}),
        ("untied", {}),
        ("moe", {"ep": 2}),
        ("moe", {"tp": 2, "sequence_parallel": True, "ep": 2}),
        ("moe", {"tp": 2, "sequence_parallel": True, "etp": 2}),
    ],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models in HF format. `expected.pt` in each folder holds HF's logits of the test pack."""
    root = tmp_path_factory.mktemp("hf")
    made = {
        "untied": write_tiny_hf(root / "untied", max_shard_size="200KB"),
        "tied": write_tiny_hf(root / "tied", tied=True, dtype="bfloat16"),
        "moe": write_tiny_hf(root / "moe", moe=True, num_hidden_layers=2, mlp_only_layers=[0]),
    }
    import transformers

    for folder in made.values():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            logits = [model(ids[None]).logits[0] for ids in sequences()]
        torch.save(torch.cat(logits), folder / "expected.pt")
    return made


def sequences() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randint(0, 97, (n,), generator=g) for n in LENGTHS]


def compare(rank: int, world: int, port: int, folders: dict, layouts: list, out: str) -> list:
    """[(model, layout, largest difference of logits or None)]; exports go to OUT/number."""
    from vime.backends.megatron.model.build import build_model
    from vime.backends.megatron.parallel import initialize_groups, initialize_parallel

    results = []
    for number, (name, parallel) in enumerate(layouts):
        if "recompute_granularity" in parallel:
            parallel = parallel | {"recompute_method": "uniform", "recompute_num_layers": 1}
        cfg = make_config(folders[name], parallel=parallel, cluster={"actor_gpus_per_node": world})
        if number == 0:
            initialize_parallel(cfg, rank, world, rank, "127.0.0.1", port)
        else:
            initialize_groups(cfg)
        chunks = build_model(cfg)
        load_hf_weights(chunks, folders[name], cfg)
        logits = packed_logits(cfg, chunks)
        expected = torch.load(folders[name] / "expected.pt")
        worst = None if logits is None else float((logits - expected).abs().max())
        save_hf(chunks, cfg, Path(out, str(number)))
        results.append((name, parallel, worst))
    return results


def packed_logits(cfg: Any, chunks: list) -> torch.Tensor | None:
    """[T, vocab] of the whole pack, in its order; None on a rank without logits."""
    import torch.distributed as dist
    from megatron.core import parallel_state as mpu
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from vime.backends.megatron.model.zigzag import zigzag_order

    bounds = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    starts = torch.tensor(bounds, dtype=torch.int32)
    cp, cp_rank = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
    parts = []
    for ids in sequences():
        chunk = ids.chunk(2 * cp)
        parts.append(torch.cat([chunk[cp_rank], chunk[2 * cp - 1 - cp_rank]]) if cp > 1 else ids)
    tokens = torch.cat(parts)[None]
    pack = PackedSeqParams("thd", starts, starts, max_seqlen_q=16, max_seqlen_kv=16)

    def step(_: Any, chunk: torch.nn.Module) -> tuple:
        out = chunk(tokens, torch.zeros_like(tokens), None, packed_seq_params=pack)
        return out, lambda logits, **_: logits

    got = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[None] * len(chunks),
        model=chunks,
        num_microbatches=1 if len(chunks) == 1 else 2,
        seq_length=1,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not mpu.is_pipeline_last_stage(ignore_virtual=True):
        return None
    logits = got[0].detach()[0]
    logits = torch.cat(_gather(logits, mpu.get_tensor_model_parallel_group()), -1)[:, :97]
    order = zigzag_order(bounds, cp) if cp > 1 else torch.arange(bounds[-1])
    whole = torch.cat(_gather(logits, mpu.get_context_parallel_group()))[order]
    dist.barrier(mpu.get_tensor_model_parallel_group())
    return whole


def _gather(t: torch.Tensor, group: Any) -> list[torch.Tensor]:
    import torch.distributed as dist

    parts = [torch.empty_like(t) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, t.contiguous(), group=group)
    return parts


@pytest.mark.parametrize("world", LAYOUTS)
def test_logits_and_bytes_are_those_of_hugging_face(
    world: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    layouts = LAYOUTS[world]
    ranks = run_ranks(compare, int(world[0]), folders=folders, layouts=layouts, out=str(tmp_path))
    for number, (name, _) in enumerate(layouts):
        worst = [r[number] for r in ranks if r[number][2] is not None]
        assert worst
        for layout in worst:
            assert layout[2] < 1e-4, layout
        files = [p.name for p in folders[name].iterdir() if p.suffix in (".safetensors", ".json")]
        assert len(files) > 2
        _, differ, missing = filecmp.cmpfiles(
            folders[name], tmp_path / str(number), files, shallow=False
        )
        assert (differ, missing) == ([], []), layouts[number]


def load_wrong_shape(rank: int, world: int, port: int, folder: Path) -> str:
    from vime.backends.megatron.model.build import build_model
    from vime.backends.megatron.parallel import initialize_parallel
    from vime.errors import CheckpointError

    cfg = make_config(folder)
    initialize_parallel(cfg, rank, world)
    chunks = build_model(cfg)
    try:
        load_hf_weights(chunks, folder, cfg)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    folder = write_tiny_hf(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 160}))
    (said,) = run_ranks(load_wrong_shape, 1, folder=folder)
    for part in ("model.safetensors", "layers.0.mlp.gate_proj.weight", "[128, 64]", "[160, 64]"):
        assert part in said

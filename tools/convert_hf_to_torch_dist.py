"""Converts an HF folder to a Megatron checkpoint (`SAVE/release/` and its tracker).

    python tools/convert_hf_to_torch_dist.py ${MODEL_ARGS[@]} --hf-checkpoint HF --save SAVE

One process is enough, and every layout loads the result. Memory holds one weight at a time, not
the model. Several processes share the work under torchrun, with --tensor-model-parallel-size,
--pipeline-model-parallel-size or --expert-model-parallel-size. Weights keep the dtype of
config.json unless --dtype is given. Exit codes: 2 for bad input, 1 if writing fails.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from vime.backends.megatron.checkpoints.commit import RELEASE, TRACKER
from vime.backends.megatron.hf.check import check_model_args
from vime.backends.megatron.hf.registry import in_stored_dtype
from vime.cli import parse_convert_config
from vime.config import Config
from vime.errors import CheckpointError
from vime.observe.bar import ByteBar


def main() -> int:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cfg = parse_convert_config(
        checks=[check_model_args, target_is_free, lambda c: layout_fits(c, world)]
    )
    cfg = in_stored_dtype(cfg)

    def say(line: str) -> None:
        if rank == 0:
            print(line, flush=True)

    say("starting Megatron")
    from vime.backends.megatron.checkpoints.streaming import Conversion
    from vime.backends.megatron.model.build import build_model  # takes seconds, so after the checks
    from vime.backends.megatron.parallel import initialize_parallel, shutdown_parallel

    started = time.monotonic()
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "0")
    initialize_parallel(cfg, rank, world, int(os.environ.get("LOCAL_RANK", 0)), address, int(port))
    step = "reading"
    try:
        say(f"1/2 laying out the model on {world} rank(s), {cfg.model.dtype}")
        conversion = Conversion(cfg, build_model(cfg))
        step, size = "writing", conversion.num_bytes
        say(f"2/2 {cfg.model.hf_checkpoint} -> {cfg.checkpoint.save}, {size / 1e9:.2f} GB a rank")
        with ByteBar("converting", size, shown=rank == 0) as bar:
            target = conversion.write(str(cfg.checkpoint.save), bar.add)
    except CheckpointError as error:
        if rank == 0:
            print(f"error while {step}: {error}", file=sys.stderr)
        return 2 if step == "reading" else 1
    finally:
        shutdown_parallel()
    say(f"done in {time.monotonic() - started:.1f} s: {target}")
    say(f"use it with --ref-load {cfg.checkpoint.save}")
    return 0


def target_is_free(cfg: Config) -> list[str]:
    """A problem if --save holds a run's checkpoints, because it would lose their tracker."""
    tracker = Path(cfg.checkpoint.save or "", TRACKER)
    if not cfg.checkpoint.save or not tracker.is_file() or tracker.read_text().strip() == RELEASE:
        return []
    return [
        f"--save {cfg.checkpoint.save} holds the checkpoints of a training run. "
        "Convert into another folder."
    ]


def layout_fits(cfg: Config, world: int) -> list[str]:
    """A problem unless torchrun started as many ranks as the layout needs."""
    p = cfg.parallel
    needed = p.tp * p.pp * p.cp
    if world % needed == 0 and world % (p.etp * p.ep * p.pp) == 0:
        return []
    return [
        f"tensor {p.tp} x pipeline {p.pp} x context {p.cp} parallel, with {p.ep} x {p.etp} for "
        f"experts, does not fit {world} process(es). Start it with: torchrun --nproc-per-node "
        f"{max(needed, p.ep * p.etp * p.pp)} tools/convert_hf_to_torch_dist.py ..."
    ]


if __name__ == "__main__":
    sys.exit(main())

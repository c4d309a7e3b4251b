"""Converts a Megatron checkpoint to an HF folder with the layout of the original folder.

    python tools/convert_torch_dist_to_hf.py --input-dir SAVE --output-dir OUT --origin-hf-dir HF

`--input-dir` is a checkpoint folder, whose latest iteration is converted, or one iter_* directory.
Memory holds one weight at a time, not the model. --origin-hf-dir gives config, tokenizer, and the
names, dtypes and files of the tensors. Exit codes: 2 for bad input, 1 if writing fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from vime.backends.megatron.checkpoints.start import resolve
from vime.backends.megatron.hf.check import check_model_args
from vime.backends.megatron.hf.registry import in_stored_dtype
from vime.backends.megatron.weights.folder import save_hf
from vime.cli import parse_convert_config
from vime.errors import CheckpointError
from vime.observe.bar import ByteBar


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--input-dir", required=True, help="checkpoint folder, or an iter_* in it")
    parser.add_argument("--output-dir", required=True, help="HF folder to write")
    parser.add_argument("--origin-hf-dir", required=True, help="HF folder of the original model")
    parser.add_argument("-f", "--force", action="store_true", help="write into an existing folder")
    given = parser.parse_args()
    output = Path(given.output_dir)
    if output.is_dir() and any(output.iterdir()) and not given.force:
        parser.error(f"--output-dir {output} is not empty. Choose another folder, or add -f.")
    if not Path(given.input_dir).is_dir():
        parser.error(f"--input-dir {given.input_dir} does not exist.")
    argv = ["--hf-checkpoint", given.origin_hf_dir, "--save", given.output_dir]
    cfg = in_stored_dtype(parse_convert_config(argv, checks=[check_model_args]))

    from vime.backends.megatron.checkpoints.streaming import StoredWeights
    from vime.backends.megatron.model.build import build_model  # takes seconds, so after the checks
    from vime.backends.megatron.parallel import initialize_parallel, shutdown_parallel

    started = time.monotonic()
    initialize_parallel(cfg, rank=0, world_size=1)
    step = "reading"
    try:
        start = resolve(None, given.input_dir)
        print(f"1/2 laying out the model, {cfg.model.dtype}", flush=True)
        (chunk,) = build_model(cfg)
        stored = StoredWeights(start, chunk)
        step, size = "writing", sum(p.nbytes for p in chunk.parameters())
        print(f"2/2 {start.folder} -> {output}, {size / 1e9:.2f} GB", flush=True)
        with ByteBar("converting", size) as bar:
            save_hf([chunk], cfg, output, bar.add, stored.read)
    except CheckpointError as error:
        message = str(error).replace("--ref-load", "--input-dir")
        print(f"error while {step}: {message}", file=sys.stderr)
        return 2 if step == "reading" else 1
    finally:
        shutdown_parallel()
    print(f"done in {time.monotonic() - started:.1f} s: {output}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

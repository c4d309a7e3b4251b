"""Converts a checkpoint of Qwen3-4B's shapes there and back: seconds and peak memory.

    make bench-convert       random bfloat16 weights; needs 26 GB of disk under TMPDIR, freed after

Memory is the process's own (RssAnon, sampled every 20 ms). File pages do not count, because the
kernel can take them back at any time. The peer is a plain copy of the model's files. The exported
files must have the bytes of the originals.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import RESULTS, on_this_cpu, save
from benchmarks.tables import markdown, put

ROOT = Path(__file__).resolve().parents[1]
RESULT = RESULTS / "convert_4b.json"
SHAPE = json.loads((ROOT / "tests/unit/hf_configs/qwen3-4B.json").read_text())
SHARD_BYTES = 2_000_000_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--output", type=Path, default=RESULT)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vime-convert-") as tmp:
        figures = measure(Path(tmp), given.layers)
    save(given.output, figures)
    if given.output == RESULT:
        put("models.md", "convert", table_of(figures))
    for figure in figures:
        print(f"{figure['name']:40} {figure['value']:10.2f} {figure['unit']}")
    return int(not all(f["value"] for f in figures if f["name"].endswith("bytes_are_equal")))


def table_of(figures: list[dict[str, Any]]) -> str:
    """Markdown: seconds and peak memory of both directions, and the seconds of a plain copy."""
    value = {f["name"].removeprefix("convert_4b/"): f["value"] for f in figures}
    rows = [[f"{value['model']:.1f} GB of weights", "seconds", "peak memory"]]
    for way, what in (
        ("hf_to_torch_dist", "Hugging Face to Megatron"),
        ("torch_dist_to_hf", "Megatron to Hugging Face"),
    ):
        memory = f"{value[f'{way}/peak_memory']:.1f} GB"
        rows.append([what, f"{value[f'{way}/time']:.0f}", memory])
    rows.append(["a plain copy of the files", f"{value['copy/time']:.0f}", ""])
    return markdown(rows)


def measure(root: Path, num_layers: int) -> list[dict[str, Any]]:
    hf, megatron, back = root / "hf", root / "megatron", root / "back"
    size, largest = write_random(hf, num_layers)
    started = time.perf_counter()
    shutil.copytree(hf, root / "copy")
    copy_s = time.perf_counter() - started
    shutil.rmtree(root / "copy")
    start_gb, _ = run_tool("convert_hf_to_torch_dist.py", "--help")
    there_gb, there_s = run_tool(
        "convert_hf_to_torch_dist.py", "--hf-checkpoint", hf, "--save", megatron
    )
    paths = ("--input-dir", megatron, "--output-dir", back, "--origin-hf-dir", hf)
    back_gb, back_s = run_tool("convert_torch_dist_to_hf.py", *paths)
    names = [p.name for p in hf.glob("*.safetensors")]
    equal = bool(names) and not any(filecmp.cmpfiles(hf, back, names, shallow=False)[1:])
    values = {
        "model": (size / 1e9, "GB"),
        "largest_weight": (largest / 1e9, "GB"),
        "hf_to_torch_dist/time": (there_s, "s"),
        "hf_to_torch_dist/peak_memory": (there_gb, "GB"),
        "torch_dist_to_hf/time": (back_s, "s"),
        "torch_dist_to_hf/peak_memory": (back_gb, "GB"),
        "copy/time": (copy_s, "s"),
        "program_alone/memory": (start_gb, "GB"),
        "bytes_are_equal": (float(equal), "1"),
    }
    common = {
        "peer": "shutil.copytree of the same files",
        "spread": None,
        **on_this_cpu(),
    }
    return [
        {"name": f"convert_4b/{name}", "value": round(value, 3), "unit": unit, **common}
        for name, (value, unit) in values.items()
    ]


def write_random(folder: Path, num_layers: int) -> tuple[int, int]:
    """Writes an HF folder in shards; (bytes of all weights, bytes of the largest)."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    config = SHAPE | {"num_hidden_layers": num_layers, "dtype": "bfloat16"}
    for name in ("layer_types", "torch_dtype"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}  # tied weights appear once
    generator, shards, held = torch.Generator().manual_seed(0), [], {}
    for name, shape in shapes.items():
        held[name] = torch.empty(shape, dtype=torch.bfloat16).uniform_(
            -0.05, 0.05, generator=generator
        )
        if sum(t.nbytes for t in held.values()) > SHARD_BYTES or name == list(shapes)[-1]:
            shards.append((f"model-{len(shards) + 1:05d}.safetensors", list(held)))
            save_file(held, folder / shards[-1][0], metadata={"format": "pt"})
            held = {}
    sizes = {n: 2 * torch.Size(s).numel() for n, s in shapes.items()}
    index = {
        "metadata": {"total_size": sum(sizes.values())},
        "weight_map": {name: file for file, names in shards for name in names},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(sizes.values()), max(sizes.values())


def run_tool(name: str, *words: Any) -> tuple[float, float]:
    """(peak of the tool's own memory in GB, seconds)"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, words)]
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, own_memory(process.pid))
        time.sleep(0.02)
    assert process.returncode == 0, f"{name} ended with {process.returncode}"
    return peak / 1e9, time.perf_counter() - started


def own_memory(pid: int) -> int:
    """Bytes of RssAnon; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith("RssAnon")]
    return int(found[0]) * 1024 if found else 0


if __name__ == "__main__":
    sys.exit(main())

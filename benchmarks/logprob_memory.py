"""Peak memory of log-probabilities and entropy, forward and backward: in chunks and dense.

    python benchmarks/logprob_memory.py     writes benchmarks/results/logprob_memory.json

The logits are bfloat16 with a vocabulary of 152k. The dense way copies them to float32, takes
log_softmax and lets autograd keep its tensors. `token_logprobs` works in chunks of tokens. Each way
runs in its own process. Its figure is the growth of the largest resident size, without the logits.
Exactness compares both ways in float32, on a few tokens in several chunks, with the dense way in
float64: the largest difference over the largest value.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.records import RESULTS, on_this_cpu, save  # noqa: E402
from vime.backends.megatron.training.logprobs import TokenLogProbs, token_logprobs  # noqa: E402

RESULT = RESULTS / "logprob_memory.json"
VOCAB = 151_936
TOKENS = 1024
TARGET = 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--measure", choices=("dense", "chunked"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(peak_bytes(args.measure, args.tokens))
        return 0
    common = {**on_this_cpu(("torch",)), "num_tokens": args.tokens, "vocab_size": VOCAB}
    figures: list[dict[str, Any]] = []
    for way in ("dense", "chunked"):
        mib = in_own_process(way, args.tokens) / 2**20
        figures.append({"name": f"logprob_memory/{way}", "unit": "MiB", "value": round(mib, 1)})
    dense, chunked = (f["value"] for f in figures)
    figures.append(
        {"name": "logprob_memory/share", "unit": "1", "value": round(chunked / dense, 4)}
    )
    for name, apart in largest_differences(num_tokens=8, chunk=3).items():
        figures.append(
            {"name": f"logprob_memory/{name}_diff", "unit": "1", "value": apart, "target": TARGET}
        )
    figures = [f | common for f in figures]
    for f in figures:
        print(f"{f['name']:<32} {f['value']:.6g} {f['unit']}")
    save(args.output, figures)
    print(f"written to {args.output}")
    return 0


def dense_logprobs(logits_TV: Tensor, taken_T: Tensor) -> TokenLogProbs:
    precise_TV = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
    logp_TV = precise_TV.log_softmax(-1)
    entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
    return TokenLogProbs(logp_TV.gather(-1, taken_T[:, None])[:, 0], entropy_T)


def compute(
    way: str, logits_TV: Tensor, taken_T: Tensor, chunk: int | None = None
) -> TokenLogProbs:
    if way == "dense":
        out = dense_logprobs(logits_TV, taken_T)
    else:
        out = token_logprobs(logits_TV, taken_T, chunk_tokens=chunk)
    (out.logp_T - 0.01 * out.entropy_T).sum().backward()
    return out


def peak_bytes(way: str, tokens: int) -> int:
    torch.set_num_threads(1)
    logits_TV = torch.empty(tokens, VOCAB, dtype=torch.bfloat16)
    for row in logits_TV:  # before the measurement, no temporary is larger than a row
        row.copy_(torch.randn(VOCAB))
    logits_TV.requires_grad_()
    taken_T = torch.randint(VOCAB, (tokens,))
    compute(way, logits_TV[:1].detach().requires_grad_(), taken_T[:1])  # loads the kernels
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    compute(way, logits_TV, taken_T)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def in_own_process(way: str, tokens: int) -> int:
    argv = [sys.executable, __file__, "--measure", way]
    argv += ["--tokens", str(tokens)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True, timeout=600, env=env)
    return int(done.stdout.split()[-1])


def largest_differences(num_tokens: int, chunk: int) -> dict[str, float]:
    """{output or gradient, with "dense_" for the dense way: largest difference / largest value}"""
    g = torch.Generator().manual_seed(0)
    logits_TV = 4 * torch.randn(num_tokens, VOCAB, generator=g)
    taken_T = torch.randint(VOCAB, (num_tokens,), generator=g)

    def figures_of(way: str, own: Tensor) -> dict[str, Tensor]:
        own.requires_grad_()
        out = compute(way, own, taken_T, chunk)
        made = {"logp": out.logp_T, "entropy": out.entropy_T, "gradient": own.grad}
        return {name: t.detach().double() for name, t in made.items()}

    exact = figures_of("dense", logits_TV.double())
    found = {}
    for way, prefix in (("chunked", ""), ("dense", "dense_")):
        for name, t in figures_of(way, logits_TV.clone()).items():
            apart = (t - exact[name]).abs().max() / exact[name].abs().max()
            found[prefix + name] = float(apart)
    return found


if __name__ == "__main__":
    sys.exit(main())

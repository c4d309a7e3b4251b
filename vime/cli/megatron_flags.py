"""Megatron's flags that have no field in the configuration.

`MODEL_FLAGS` describe an architecture; they are compared with `config.json`. `STATED` are flags of
common launch scripts that ask for the only behaviour that vime has. This value is accepted, and all
other values are refused. `IDLE` flags change nothing here: they pass with a notice.
`is_megatrons` knows the names of all other flags of Megatron.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path


def _one_or_more(text: str) -> int | str:
    """`--moe-layer-freq`: a number, or a pattern such as "([0]*1+[1]*47)"."""
    return int(text) if text.isdigit() else text


SWITCH = bool

MODEL_FLAGS: dict[str, Callable[[str], object]] = {
    "--num-layers": int,
    "--hidden-size": int,
    "--ffn-hidden-size": int,
    "--num-attention-heads": int,
    "--group-query-attention": SWITCH,
    "--num-query-groups": int,
    "--kv-channels": int,
    "--max-position-embeddings": int,
    "--position-embedding-type": str,
    "--rotary-base": float,
    "--rotary-percent": float,
    "--rotary-interleaved": SWITCH,
    "--use-rope-scaling": SWITCH,
    "--rope-scaling-factor": float,
    "--normalization": str,
    "--norm-epsilon": float,
    "--apply-layernorm-1p": SWITCH,
    "--qk-layernorm": SWITCH,
    "--post-self-attn-layernorm": SWITCH,
    "--post-mlp-layernorm": SWITCH,
    "--multi-latent-attention": SWITCH,
    "--q-lora-rank": int,
    "--kv-lora-rank": int,
    "--qk-head-dim": int,
    "--qk-pos-emb-head-dim": int,
    "--v-head-dim": int,
    "--rope-type": str,
    "--rotary-scaling-factor": float,
    "--original-max-position-embeddings": int,
    "--beta-fast": float,
    "--beta-slow": float,
    "--mscale": float,
    "--mscale-all-dim": float,
    "--swiglu": SWITCH,
    "--disable-bias-linear": SWITCH,
    "--add-qkv-bias": SWITCH,
    "--vocab-size": int,
    "--make-vocab-size-divisible-by": int,
    "--untie-embeddings-and-output-weights": SWITCH,
    "--num-experts": int,
    "--moe-ffn-hidden-size": int,
    "--moe-layer-freq": _one_or_more,
    "--moe-shared-expert-intermediate-size": int,
    "--moe-router-topk": int,
    "--moe-router-score-function": str,
    "--moe-router-pre-softmax": SWITCH,
    "--moe-router-num-groups": int,
    "--moe-router-group-topk": int,
    "--moe-router-enable-expert-bias": SWITCH,
    "--moe-router-bias-update-rate": float,
    "--moe-router-dtype": str,
    "--moe-router-load-balancing-type": str,
    "--moe-router-topk-scaling-factor": float,
    "--moe-aux-loss-coeff": float,
}


@dataclass(frozen=True, slots=True)
class Stated:
    """A flag's accepted values (a switch has none), and the reason for refusing other values."""

    values: tuple[str, ...] = ()
    because: str = ""


@dataclass(frozen=True, slots=True)
class Idle:
    """Why a flag changes nothing here."""

    because: str
    takes_value: bool = False


STATED: dict[str, Stated] = {
    "--attention-dropout": Stated(("0", "0.0"), "neither training nor generation uses dropout"),
    "--hidden-dropout": Stated(("0", "0.0"), "neither training nor generation uses dropout"),
    "--attention-softmax-in-fp32": Stated(),
    "--attention-backend": Stated(("auto", "flash"), "vime has its own attention"),
    "--use-mcore-models": Stated(),
    "--use-rotary-position-embeddings": Stated(),
    "--rotary-seq-len-interpolation-factor": Stated(
        ("1", "1.0"), "positions are scaled as config.json of --hf-checkpoint says"
    ),
    "--moe-token-dispatcher-type": Stated(
        ("alltoall",), "packs differ in length, which Megatron allows with alltoall only"
    ),
    "--train-backend": Stated(("megatron",), "Megatron-core is the trainer"),
    "--qkv-format": Stated(("thd",), "sequences are always packed"),
    "--megatron-to-hf-mode": Stated(("raw",), "weights are named by vime's own rules"),
    "--distributed-backend": Stated(("nccl",), "GPUs use NCCL, and CPU ranks use gloo"),
    "--update-weight-mode": Stated(("full",), "the trainer sends all weights"),
    "--update-weight-transport": Stated(("nccl",), "engines on other GPUs use NCCL"),
    "--vllm-weight-sync-packed": Stated(),
    "--rollout-data-transport": Stated(("object-store",), "batches travel through Ray"),
    "--flush-cache-interval": Stated(("1",), "every update of the weights empties the caches"),
    "--disable-rollout-trim-samples": Stated(),
    "--use-dynamic-global-batch-size": Stated(),
    "--ckpt-format": Stated(("torch_dist",), "checkpoints have the format torch_dist"),
}

_KERNELS = "vime chooses its kernels itself"
_MASKS = "attention over packs needs no mask"
_LENGTHS = "packs differ in length"
_TOKENIZER = "vime uses the tokenizer of --hf-checkpoint"
_LOG = "vime logs metrics and timings after every step"
_FORMAT = "vime recognises the format of a checkpoint"

IDLE: dict[str, Idle] = {
    "--no-rope-fusion": Idle(_KERNELS),
    "--no-masked-softmax-fusion": Idle(_KERNELS),
    "--no-bias-dropout-fusion": Idle(_KERNELS),
    "--no-bias-gelu-fusion": Idle(_KERNELS),
    "--no-bias-swiglu-fusion": Idle(_KERNELS),
    "--no-gradient-accumulation-fusion": Idle(_KERNELS),
    "--no-persist-layer-norm": Idle(_KERNELS),
    "--cross-entropy-loss-fusion": Idle(_KERNELS),
    "--cross-entropy-fusion-impl": Idle(_KERNELS, takes_value=True),
    "--use-flash-attn": Idle(_KERNELS),
    "--transformer-impl": Idle(_KERNELS, takes_value=True),
    "--no-create-attention-mask-in-dataloader": Idle(_MASKS),
    "--seq-length": Idle(_LENGTHS, takes_value=True),
    "--tokenizer-type": Idle(_TOKENIZER, takes_value=True),
    "--tokenizer-model": Idle(_TOKENIZER, takes_value=True),
    "--log-interval": Idle(_LOG, takes_value=True),
    "--log-throughput": Idle(_LOG),
    "--auto-detect-ckpt-format": Idle(_FORMAT),
    "--use-dist-ckpt": Idle(_FORMAT),
}

BF16 = "--bf16"  # another spelling of --dtype bfloat16


@cache
def _names() -> frozenset[str]:
    """The flags of Megatron, from the list that tools/list_megatron_flags.py writes."""
    return frozenset(Path(__file__).with_name("megatron_flag_names.txt").read_text().split())


def is_megatrons(name: str) -> bool:
    return name in _names()

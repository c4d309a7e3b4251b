"""A decoder's sizes, and the parameters of each of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vime.backends.megatron.hf.family import moe_layers
from vime.backends.megatron.hf.registry import model_args
from vime.config import Config
from vime.errors import CheckpointError, ConfigError


@dataclass(frozen=True, slots=True)
class Latent:
    """Sizes of multi-head latent attention (arXiv:2405.04434); q_rank 0: queries have full rank."""

    q_rank: int
    kv_rank: int
    nope: int
    rope: int
    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder. Sizes are in channels; counts are in parameters; dense layers have no experts."""

    hidden: int
    layers: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    tied: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    sandwich: bool = False
    latent: Latent | None = None
    dense_layers: int
    experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0

    @property
    def q(self) -> int:
        """Channels of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def matrix(self) -> int:
        """Parameters of one vocabulary matrix: embedding or output."""
        return self.vocab * self.hidden

    @property
    def attention(self) -> int:
        h, m = self.hidden, self.latent
        if m is None:
            bias = self.q + 2 * self.kv if self.qkv_bias else 0
            norms = 2 * self.head_dim if self.qk_norm else 0
            return 2 * h * (self.q + self.kv) + bias + norms
        key = m.nope + m.rope
        reduced = h * m.q_rank + m.q_rank + m.q_rank * self.heads * key
        query = reduced if m.q_rank else h * self.heads * key
        latent = h * (m.kv_rank + m.rope) + m.kv_rank
        return query + latent + self.heads * (m.kv_rank * (m.nope + m.value) + m.value * h)

    @property
    def norms(self) -> int:
        return (4 if self.sandwich else 2) * self.hidden

    @property
    def dense_layer(self) -> int:
        return self.attention + self.norms + 3 * self.hidden * self.ffn

    @property
    def expert_layer(self) -> int:
        """A layer with experts, without its routed experts (see `routed`)."""
        router = self.hidden * self.experts
        return self.attention + self.norms + router + 3 * self.hidden * self.shared_ffn

    @property
    def routed(self) -> int:
        """The routed experts of one layer together."""
        return 3 * self.hidden * self.expert_ffn * self.experts

    @property
    def parameters(self) -> int:
        dense, sparse = self.dense_layers, self.layers - self.dense_layers
        layers = dense * self.dense_layer + sparse * (self.expert_layer + self.routed)
        return layers + self.hidden + self.matrix * (1 if self.tied else 2)

    def training_flops(self, lengths: Sequence[int]) -> float:
        """FLOPs of one step over sequences of these lengths, without recomputation.

        Each token takes 2 FLOPs forward and 4 backward for every weight that it meets, including
        the output matrix. Attention takes as many for each channel and each visible token.
        """
        seen = sum(length * length for length in lengths) / 2
        return 6 * (self._weights_per_token * sum(lengths) + self._attention_channels * seen)

    @property
    def attention_equals_rest(self) -> float:
        """The length of a sequence whose attention takes as many FLOPs as its weights do."""
        return 2 * self._weights_per_token / self._attention_channels

    @property
    def _weights_per_token(self) -> float:
        """The number of weights that a token is multiplied with, including the output matrix."""
        routed = (self.layers - self.dense_layers) * self.routed
        rest = self.parameters - (0 if self.tied else self.matrix) - routed
        return rest + (routed * self.top_k / self.experts if self.experts else 0)

    @property
    def _attention_channels(self) -> int:
        """The channels of keys and values over all heads and layers."""
        m = self.latent
        head = m.nope + m.rope + m.value if m else 2 * self.head_dim
        return self.layers * self.heads * head

    @classmethod
    def of(cls, args: dict[str, Any]) -> Shape:
        """The shape of an architecture in Megatron's flags (see `hf.registry.architecture`)."""
        heads = args["num_attention_heads"]
        latent = None
        if args["multi_latent_attention"]:
            sizes = ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
            latent = Latent(args["q_lora_rank"] or 0, *(args[name] for name in sizes))
        return cls(
            hidden=args["hidden_size"],
            layers=args["num_layers"],
            vocab=args["vocab_size"],
            heads=heads,
            kv_heads=args["num_query_groups"] if args["group_query_attention"] else heads,
            head_dim=args["kv_channels"],
            ffn=args["ffn_hidden_size"],
            tied=not args["untie_embeddings_and_output_weights"],
            qk_norm=args["qk_layernorm"],
            qkv_bias=args["add_qkv_bias"],
            sandwich=args["post_self_attn_layernorm"] and args["post_mlp_layernorm"],
            latent=latent,
            dense_layers=args["num_layers"] - len(moe_layers(args)),
            experts=args.get("num_experts") or 0,
            top_k=args.get("moe_router_topk", 0),
            expert_ffn=args.get("moe_ffn_hidden_size", 0),
            shared_ffn=args.get("moe_shared_expert_intermediate_size") or 0,
        )


def shape_of(cfg: Config) -> Shape | None:
    """The shape of the model that a run trains; None for an architecture that vime cannot train."""
    try:
        return Shape.of(model_args(cfg))
    except (CheckpointError, ConfigError, KeyError):
        return None

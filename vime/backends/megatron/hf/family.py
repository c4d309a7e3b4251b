"""What a model family is: how its weights are called on either side, and its architecture.

A family is one file of this folder: a table of `Rule`s and a function that reads `config.json`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Kind(Enum):
    """How Megatron lays a weight out over tensor parallel ranks."""

    REPLICATED = "the same on every rank"
    VOCAB = "rows are the vocabulary, padded to an even share"
    COLUMN = "rows are split"
    ROW = "columns are split"
    GLU = "gate and up are one weight; each is split by rows"
    GLU_MERGED = "the same, and one weight in the HF folder too"
    QKV = "query, key and value are one weight, grouped by key/value head; groups are split"

    @property
    def is_replicated(self) -> bool:
        return self is Kind.REPLICATED


@dataclass(frozen=True, slots=True)
class Rule:
    """One Megatron weight and the HF tensors that it is made of.

    {l} in a name is the layer's number in the whole model, {e} the expert's. A rule with `when`
    holds for architectures (see `Family.megatron_args`) of which it is true.
    """

    mcore: str
    hf: tuple[str, ...]
    kind: Kind
    when: Callable[[dict[str, Any]], bool] = lambda args: True

    @property
    def is_expert(self) -> bool:
        return "{e}" in self.mcore


@dataclass(frozen=True, slots=True)
class Weight:
    """A rule applied to one layer and expert."""

    mcore: str
    hf: tuple[str, ...]
    kind: Kind
    expert: int | None


@dataclass(frozen=True, slots=True)
class Family:
    """
    megatron_args  config.json -> the architecture under Megatron's flag names (dests)
    tied           HF name of the output weight that tied embeddings leave out
    ignored        HF names (patterns) that hold nothing to load
    extra_layers   layers that may follow the last one and are not trained (multi-token prediction)
    """

    model_type: str
    rules: tuple[Rule, ...]
    megatron_args: Callable[[dict[str, Any]], dict[str, Any]]
    tied: str = "lm_head.weight"
    ignored: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
    extra_layers: int = 0

    def weights(self, args: dict[str, Any]) -> Iterator[Weight]:
        """Every weight of the whole model. `args`: the architecture, see `megatron_args`."""
        layers, experts = args["num_layers"], args.get("num_experts") or 0
        tied = not args["untie_embeddings_and_output_weights"]
        moe = moe_layers(args)
        rules = [r for r in self.rules if r.when(args)]
        head = [r for r in rules if "{l}" not in r.mcore]
        body = [r for r in rules if "{l}" in r.mcore]
        for rule in head:
            if not (tied and self.tied in rule.hf):
                yield Weight(rule.mcore, rule.hf, rule.kind, None)
        for layer in range(layers):
            for rule in body:
                if layer in moe and _is_dense_mlp(rule) or layer not in moe and _is_moe(rule):
                    continue
                for expert in range(experts) if rule.is_expert else (None,):
                    at = {"l": layer, "e": expert}
                    names = tuple(name.format(**at) for name in rule.hf)
                    yield Weight(rule.mcore.format(**at), names, rule.kind, expert)

    def is_ignored(self, hf_name: str, args: dict[str, Any]) -> bool:
        """A stored tensor that may be left alone: a derived one, or a tied weight stored twice."""
        if hf_name == self.tied and not args["untie_embeddings_and_output_weights"]:
            return True
        layer = re.match(r"model\.layers\.(\d+)\.", hf_name)
        if layer and args["num_layers"] <= int(layer[1]) < args["num_layers"] + self.extra_layers:
            return True
        return any(re.fullmatch(pattern, hf_name) for pattern in self.ignored)


def moe_layers(args: dict[str, Any]) -> set[int]:
    """Which layers hold experts: Megatron's --moe-layer-freq, a number or one entry per layer."""
    if not args.get("num_experts"):
        return set()
    pattern = layer_pattern(args.get("moe_layer_freq", 1), args["num_layers"])
    return {i for i, on in enumerate(pattern) if on}


def layer_pattern(freq: int | str | list[int], num_layers: int) -> list[int]:
    """--moe-layer-freq spelled out: 1 for a layer with experts. "([0]*1+[1]*3)" is [0, 1, 1, 1].

    Raises ValueError on a text that is no such pattern.
    """
    if isinstance(freq, int):
        return [int(i % freq == 0) for i in range(num_layers)]
    if isinstance(freq, list):
        return freq
    text = freq.replace(" ", "").strip("()")
    if not re.fullmatch(r"\[[01](,[01])*\](\*\d+)?(\+\[[01](,[01])*\](\*\d+)?)*", text):
        raise ValueError(f"{freq!r} is not a pattern such as ([0]*1+[1]*47)")
    pattern: list[int] = []
    for term in text.split("+"):
        digits, _, times = term.partition("*")
        pattern += [int(d) for d in digits.strip("[]").split(",")] * int(times or 1)
    return pattern


def _is_moe(rule: Rule) -> bool:
    return rule.is_expert or ".mlp.router." in rule.mcore or ".mlp.shared_experts." in rule.mcore


def _is_dense_mlp(rule: Rule) -> bool:
    return ".mlp.linear_fc" in rule.mcore

"""The parts of a model family: architecture, and names of weights in Megatron and Hugging Face.

A family is one file of `families/`: a table of `Rule`s and a function that reads `config.json`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
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
    GLU_MERGED = "gate and up are one weight in the HF folder too; each is split by rows"
    QKV = "query, key and value are one weight, grouped by key/value head; groups are split"

    @property
    def is_replicated(self) -> bool:
        return self is Kind.REPLICATED


@dataclass(frozen=True, slots=True)
class Rule:
    """One Megatron weight and the HF tensors that it is made of.

    In a name, {l} is the layer's number in the whole model and {e} is the expert's number. A rule
    applies to the architectures (see `Family.megatron_args`) for which `when` is true.
    """

    mcore: str
    hf: tuple[str, ...]
    kind: Kind
    when: Callable[[dict[str, Any]], bool] = lambda args: True

    @property
    def is_routed(self) -> bool:
        """Whether the weight exists once for each routed expert."""
        return "{e}" in self.mcore

    @property
    def is_sparse(self) -> bool:
        """Whether only layers with experts have the weight."""
        return self.is_routed or any(n in self.mcore for n in (".mlp.router.", ".shared_experts."))

    @property
    def is_dense(self) -> bool:
        """Whether only layers without experts have the weight."""
        return ".mlp.linear_fc" in self.mcore


@dataclass(frozen=True, slots=True)
class Weight:
    """A rule applied to one layer, and to one expert if the weight belongs to an expert."""

    mcore: str
    hf: tuple[str, ...]
    kind: Kind
    expert: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """
    model_type     the name in config.json
    title          the models that belong to it, for the documentation
    differs        what differs from a plain Llama, for the documentation
    rules          its weights
    megatron_args  config.json -> the architecture under Megatron's flag names (dests)
    tiny           {name: changes to a tiny config.json}. Tests compare each with Hugging Face
    tied           HF name of the output weight, which is absent if embeddings are tied
    ignored        HF names (patterns) of tensors that are not loaded
    extra_layers   layers that may follow the last layer and do not train (multi-token prediction)
    """

    model_type: str
    title: str
    differs: str
    rules: tuple[Rule, ...]
    megatron_args: Callable[[dict[str, Any]], dict[str, Any]]
    tiny: Mapping[str, dict[str, Any]]
    tied: str = "lm_head.weight"
    ignored: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
    extra_layers: int = 0

    def weights(self, args: dict[str, Any]) -> Iterator[Weight]:
        """Every weight of the whole model. `args`: the architecture, see `megatron_args`."""
        tied = not args["untie_embeddings_and_output_weights"]
        sparse_layers = moe_layers(args)
        rules = [r for r in self.rules if r.when(args)]
        for rule in rules:
            if "{l}" not in rule.mcore and not (tied and self.tied in rule.hf):
                yield Weight(rule.mcore, rule.hf, rule.kind, None)
        in_layers = [r for r in rules if "{l}" in r.mcore]
        for layer in range(args["num_layers"]):
            sparse = layer in sparse_layers
            for rule in in_layers:
                if rule.is_dense if sparse else rule.is_sparse:
                    continue
                for expert in range(args["num_experts"]) if rule.is_routed else (None,):
                    at = {"l": layer, "e": expert}
                    names = tuple(name.format(**at) for name in rule.hf)
                    yield Weight(rule.mcore.format(**at), names, rule.kind, expert)

    def is_ignored(self, hf_name: str, args: dict[str, Any]) -> bool:
        """Whether a stored tensor need not be loaded: it is derived, or is a tied weight's copy."""
        if hf_name == self.tied and not args["untie_embeddings_and_output_weights"]:
            return True
        layer = re.match(r"model\.layers\.(\d+)\.", hf_name)
        if layer and args["num_layers"] <= int(layer[1]) < args["num_layers"] + self.extra_layers:
            return True
        return any(re.fullmatch(pattern, hf_name) for pattern in self.ignored)


def moe_layers(args: dict[str, Any]) -> set[int]:
    """The layers that hold experts. --moe-layer-freq is a number or has one entry per layer."""
    if not args.get("num_experts"):
        return set()
    pattern = layer_pattern(args.get("moe_layer_freq", 1), args["num_layers"])
    return {i for i, on in enumerate(pattern) if on}


def layer_pattern(freq: int | str | list[int], num_layers: int) -> list[int]:
    """--moe-layer-freq spelled out: 1 for a layer with experts. "([0]*1+[1]*3)" is [0, 1, 1, 1].

    Raises ValueError if a text is not a pattern of this form.
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

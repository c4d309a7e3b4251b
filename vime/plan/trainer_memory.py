"""Memory of a trainer's GPU by component, each figure with its formula.

The formulas use P for the parameters on this GPU, b for the bytes of a weight, T for the tokens of
a micro-batch on one GPU, V for the vocabulary, h for the hidden size and t for the tensor parallel
size. They describe the kernels of a CUDA GPU. `benchmarks/memory.py` compares the estimate with a
GPU's own count.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass

from vime.config import Config
from vime.plan.parts import Part, total
from vime.plan.shape import Shape
from vime.plan.tokens import forward_tokens, tokens_per_micro_batch

ROUND = 256  # a suggested number of tokens is a multiple of it


@dataclass(frozen=True, slots=True)
class TrainerMemory:
    """The parts of a GPU's memory.

    held    parts that are always there
    phases  {name: parts that only this phase needs}
    """

    held: list[Part]
    phases: dict[str, list[Part]]

    @property
    def phase(self) -> str:
        """The phase that needs the most memory."""
        return max(self.phases, key=lambda name: total(self.phases[name]))

    @property
    def passing(self) -> list[Part]:
        return self.phases[self.phase]

    @property
    def peak(self) -> float:
        return total(self.held) + total(self.passing)


def trainer_memory(
    cfg: Config, shape: Shape, num_bytes: int, tokens: int | None = None
) -> TrainerMemory:
    """The memory of one trainer GPU, on the pipeline stage that needs the most.

    num_bytes  bytes of one weight
    tokens     tokens of a micro-batch on one GPU (default: as many as the flags allow)
    """
    stages = range(cfg.parallel.pp)
    found = [_Stage(cfg, shape, num_bytes, stage, tokens).memory() for stage in stages]
    return max(found, key=lambda memory: memory.peak)


class _Stage:
    """The estimate of one pipeline stage."""

    def __init__(
        self, cfg: Config, shape: Shape, num_bytes: int, stage: int, tokens: int | None
    ) -> None:
        self.cfg, self.shape, self.b, self.p = cfg, shape, num_bytes, cfg.parallel
        self.T = tokens or tokens_per_micro_batch(cfg)
        stages = self.p.stage_layers(shape.layers)
        self.layers, first = stages[stage], sum(stages[:stage])
        self.dense = max(0, min(shape.dense_layers - first, self.layers))
        self.is_first, self.is_last = stage == 0, stage == self.p.pp - 1
        self.s = self.p.tp if self.p.sequence_parallel else 1
        ahead, vpp = self.p.pp - 1 - stage, self.p.vpp
        # 1F1B schedule: number of forward passes that wait for their backward passes, in units of
        # a stage's layers
        self.in_flight = 1 + ahead
        if vpp is not None:
            self.in_flight = (2 * ahead + (vpp - 1) * self.p.pp + 1) / vpp

        sparse = self.layers - self.dense
        ends = self.is_first + (self.is_last and (not shape.tied or self.p.pp > 1))
        layers = self.dense * shape.dense_layer + sparse * shape.expert_layer
        dense = (ends * shape.matrix + layers) / self.p.tp + self.is_last * shape.hidden
        routed = sparse * shape.routed / (self.p.ep * self.p.etp)
        # a critic has the embedding, and a value head in place of the output matrix
        self.critic = (self.is_first * shape.matrix + layers) / self.p.tp + routed
        self.critic += self.is_last * 2 * shape.hidden
        self.parameters = dense + routed
        self.optimized = self.parameters  # parameters whose optimizer state is on this GPU
        if self.p.use_distributed_optimizer:
            expert_ranks = cfg.cluster.trainer_gpus // (self.p.etp * self.p.ep * self.p.pp)
            self.optimized = dense / (cfg.dp * self.p.cp) + routed / max(1, expert_ranks)

    def memory(self) -> TrainerMemory:
        return TrainerMemory(list(self._held()), dict(self._phases()))

    def _held(self) -> Iterator[Part]:
        here, b = self.parameters, self.b
        yield Part("weights", here * b, f"P = {here:,.0f} parameters here x b = {b}")
        gradient = 4 if self.cfg.optimizer.accumulate_fp32 else b
        yield Part("gradients", here * gradient, f"P x {gradient}")
        is_adam = self.cfg.optimizer.optimizer == "adam"
        state, counted = (8, "8 for two moments") if is_adam else (4, "4 for the momentum")
        if b < 4:
            state, counted = state + 4, f"{counted} + 4 for float32 weights"
        shards = f", of {self.optimized:,.0f}" if self.optimized < here else ""
        yield Part("optimizer", self.optimized * state, f"P x ({counted}){shards}")
        if self.cfg.algorithm.needs_critic:
            each = b + state * self.optimized / here
            counted = f"C = {self.critic:,.0f} parameters x {each:.3g} for weights and optimizer"
            yield Part("critic", self.critic * each, counted)
            yield Part("its gradients", self.critic * gradient, f"C x {gradient}")

    def _phases(self) -> Iterator[tuple[str, list[Part]]]:
        kept, one_unit, counted = self._activations()
        activations = Part("activations", self.in_flight * self.T * kept, counted)
        if self.is_last:
            yield "the log-probabilities' backward", [activations, *self._logits()]
            forward = forward_tokens(self.cfg)
            if forward > self.T:
                yield "a forward-only pass", [self._forward_logits(forward)]
        else:
            yield "a layer's backward", [activations]
        if one_unit:
            again = Part(
                "recomputed",
                self.T * (one_unit + self._layer_gradients()),
                "T x (what the recomputed layers keep + the gradients inside one)",
            )
            yield "the backward of recomputed layers", [activations, again, *self._tied_gradient()]
        yield "the optimizer's step", list(self._step())

    def _activations(self) -> tuple[float, float, str]:
        """Bytes per token kept for the backward, bytes per token recomputed at a time, formula."""
        p, layers = self.p, self.layers
        dense, sparse = self._layer(experts=False), self._layer(experts=True)
        every = self.dense * dense + (layers - self.dense) * sparse
        largest = max(dense if self.dense else 0, sparse if self.dense < layers else 0)
        entry = self.b * self.shape.hidden / self.s
        shown = f"{every / layers:,.0f}"
        if p.recompute_granularity != "full":
            return every, 0.0, f"T = {self.T:,} x {layers} layers x {shown} B"
        num = min(p.recompute_num_layers or 1, layers)
        if p.recompute_method == "block":
            kept = num * entry + every * (layers - num) / layers
            counted = f"{layers - num} layers x {shown} B + {num} inputs x {entry:,.0f} B"
            return kept, largest, f"T = {self.T:,} x ({counted})"
        inputs = -(-layers // num)
        return inputs * entry, num * largest, f"T = {self.T:,} x {inputs} inputs x {entry:,.0f} B"

    def _layer(self, *, experts: bool) -> float:
        """Bytes per token that one layer keeps for its backward.

        These are the residual stream before each norm and the results of the norms (hidden channels
        each); the projection before its split, the rotated queries and keys, and the result of
        attention; the MLP's first product (2 ffn) and its activation (ffn). In float32: the scale
        of each norm, and attention's log-sum per head.
        """
        shape, tp, s = self.shape, self.p.tp, self.s
        again = (
            self.p.recompute_modules or () if self.p.recompute_granularity == "selective" else ()
        )
        whole = (6 if shape.sandwich else 4) * shape.hidden
        if "layernorm" in again:
            whole -= 2 * shape.hidden
        mlp = (2 if "mlp_act" in again else 3) * (shape.shared_ffn if experts else shape.ffn)
        if ("shared_experts" if experts else "mlp") in again:
            mlp = 0
        routed = 0.0
        if experts and "moe" not in again:
            routed = shape.top_k * 3 * (shape.hidden + shape.expert_ffn)
        statistics = 4 * (shape.heads / tp + 2 / s)
        return self.b * ((whole + routed) / s + (self._attention() + mlp) / tp) + statistics

    def _layer_gradients(self) -> float:
        """Bytes per token of the gradients of an MLP's products, input and result."""
        ffn = self.shape.ffn if self.dense else self.shape.shared_ffn
        return self.b * (3 * ffn / self.p.tp + 2 * self.shape.hidden)

    def _attention(self) -> float:
        """Values per token that one attention keeps, over all its heads."""
        shape, m, cp = self.shape, self.shape.latent, self.p.cp
        if m is None:
            gathered = 2 * shape.kv * cp if cp > 1 else 0
            return 3 * shape.q + 3 * shape.kv + gathered
        key = shape.heads * (m.nope + m.rope)
        reduced = 2 * m.q_rank + 2 * m.kv_rank + m.rope
        return reduced + key + shape.heads * (m.nope + m.value) + 4 * key + shape.heads * m.value

    def _logits(self) -> list[Part]:
        """The logits, which their gradient overwrites, and the gradient of the output matrix."""
        shape, tp = self.shape, self.p.tp
        size = self.T * (shape.vocab / tp + shape.hidden) * self.b
        return [
            Part("logits", size, f"T x (V / t + h) x b, V = {shape.vocab:,}"),
            Part("output matrix", shape.matrix / tp * self.b, "its gradient: V x h / t x b"),
        ]

    def _forward_logits(self, tokens: int) -> Part:
        size = tokens * self.shape.vocab / self.p.tp * self.b
        return Part("logits", size, f"{tokens:,} tokens x V / t x b, V = {self.shape.vocab:,}")

    def _tied_gradient(self) -> Iterator[Part]:
        """With tied weights, the output's gradient is kept until the embedding's is computed."""
        if self.shape.tied and self.p.pp == 1:
            size = self.shape.matrix / self.p.tp * self.b
            yield Part("output matrix", size, "its gradient: V x h / t x b")

    def _step(self) -> Iterator[Part]:
        """Temporary gradients. Adam's fused kernel needs none; SGD adds the decay in a copy."""
        optimizer, needs = self.cfg.optimizer, []
        if self.b < 4 and not optimizer.accumulate_fp32:
            needs.append("4 for float32 gradients")
        if optimizer.optimizer == "sgd" and optimizer.weight_decay:
            needs.append("4 for gradients with decay")
        if needs:
            size = 4 * len(needs) * self.optimized
            yield Part("temporary", size, f"P x ({' + '.join(needs)})")


def largest_tokens(cfg: Config, shape: Shape, num_bytes: int, room: float) -> int:
    """The largest micro-batch, in tokens, whose peak fits into `room` bytes; 0 if none fits."""

    def fits(units: int) -> bool:
        return trainer_memory(cfg, shape, num_bytes, units * ROUND).peak <= room

    units = range(1, 1 << 16)
    return bisect(units, False, key=lambda n: not fits(n)) * ROUND

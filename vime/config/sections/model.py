"""The model, its checkpoints and its optimizer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from vime.config.fields import Path, Section, flag


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(Section):
    """The model. config.json defines the architecture; MODEL_ARGS are compared with it."""

    hf_checkpoint: Path = flag(
        "--hf-checkpoint", "HF folder: config, tokenizer, weights; vLLM starts from it"
    )
    override: bool = flag(
        "--override-model-config", "prefer MODEL_ARGS to config.json", default=False
    )
    args: dict[str, Any] = field(default_factory=dict)  # MODEL_ARGS: {Megatron's name: value}
    dtype: str = flag(
        "--dtype",
        "data type of the weights in trainer and engines (auto: bfloat16 on CUDA, float32 on CPU)",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig(Section):
    load: Path | None = flag(
        "--load",
        "checkpoint of the actor to continue from; if it is empty or missing, --ref-load",
        default=None,
    )
    ref_load: Path | None = flag(
        "--ref-load",
        "checkpoint of the reference model; a new run starts from it too",
        default=None,
    )
    opd_teacher_load: Path | None = flag(
        "--opd-teacher-load",
        "checkpoint or HF folder of the teacher for --opd-type megatron",
        default=None,
    )
    save: Path | None = flag("--save", "folder for checkpoints", default=None)
    save_interval: int | None = flag(
        "--save-interval", "save after every N rollouts", default=None, at_least=1
    )
    save_hf: str | None = flag(
        "--save-hf", "also export HF folders: 'dir/{rollout_id}'", default=None, fills=(0, 1)
    )
    keep_last: int | None = flag(
        "--keep-last",
        "keep N checkpoints under --save and delete older ones (default: keep all)",
        default=None,
        at_least=1,
    )
    async_save: bool = flag(
        "--async-save",
        "write checkpoints during training, from a copy in memory",
        default=False,
    )
    save_optim: bool = flag(
        "--save-optim", "save the optimizer's state", default=True, negated="--no-save-optim"
    )
    load_optim: bool = flag(
        "--load-optim", "load the optimizer's state", default=True, negated="--no-load-optim"
    )
    ckpt_step: int | None = flag(
        "--ckpt-step",
        "iteration of --load to load (default: the latest)",
        default=None,
        at_least=0,
        only_with="--load",
    )
    ref_ckpt_step: int | None = flag(
        "--ref-ckpt-step",
        "iteration of --ref-load to load (default: the latest)",
        default=None,
        at_least=0,
        only_with="--ref-load",
    )

    def problems(self) -> Iterator[str]:
        if self.save_interval is not None and self.save is None and self.save_hf is None:
            yield f"--save-interval {self.save_interval} needs a folder to save to. Add --save FOLDER."


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig(Section):
    optimizer: str = flag(
        "--optimizer", "the optimizer's rule", default="adam", choices=("adam", "sgd")
    )
    lr: float = flag("--lr", "peak learning rate", default=1e-6, at_least=0)
    min_lr: float = flag(
        "--min-lr", "learning rate at the end of the decay", default=0.0, at_least=0
    )
    lr_decay_style: str = flag(
        "--lr-decay-style",
        "shape of the decay after the warm-up",
        default="constant",
        choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    )
    lr_decay_iters: int | None = flag(
        "--lr-decay-iters",
        "optimizer steps until the decay ends (default: the whole run)",
        default=None,
        at_least=1,
    )
    lr_warmup_iters: int = flag(
        "--lr-warmup-iters", "optimizer steps of linear warm-up", default=0, at_least=0
    )
    lr_warmup_fraction: float | None = flag(
        "--lr-warmup-fraction",
        "warm-up as a fraction of the steps until the decay ends",
        default=None,
        at_least=0,
        at_most=1,
    )
    critic_lr: float | None = flag(
        "--critic-lr",
        "peak learning rate of the critic (default: --lr)",
        default=None,
        at_least=0,
    )
    critic_lr_warmup_iters: int | None = flag(
        "--critic-lr-warmup-iters",
        "optimizer steps of the critic's linear warm-up (default: the actor's)",
        default=None,
        at_least=0,
    )
    weight_decay: float = flag("--weight-decay", "weight decay", default=0.01, at_least=0)
    beta1: float = flag("--adam-beta1", default=0.9, at_least=0, at_most=1)
    beta2: float = flag("--adam-beta2", default=0.999, at_least=0, at_most=1)
    eps: float = flag("--adam-eps", default=1e-8, above=0)
    clip_grad: float = flag(
        "--clip-grad", "maximum gradient norm; 0: no clipping", default=1.0, at_least=0
    )
    accumulate_fp32: bool = flag(
        "--accumulate-allreduce-grads-in-fp32",
        "add up gradients in float32",
        default=True,
        negated="--no-accumulate-allreduce-grads-in-fp32",
    )
    freeze_names: list | None = flag(
        "--freeze-params-name-list",
        "regular expressions; freeze weights whose Megatron name matches one",
        default=None,
        nargs="+",
    )
    train_names: list | None = flag(
        "--only-train-params-name-list",
        "regular expressions; train only weights whose Megatron name matches one",
        default=None,
        nargs="+",
    )

    role_file: Path | None = flag(
        "--megatron-config-path",
        "YAML of flags that differ between actor and critic: docs/algorithms.md",
        default=None,
    )
    critic_overrides: dict[str, Any] = field(
        default_factory=dict
    )  # from --megatron-config-path: {field: value}

    @property
    def decay_ends(self) -> bool:
        """Whether the schedule depends on the number of steps."""
        return self.lr_decay_style not in ("constant", "inverse-square-root")

    def warmup_steps(self, decay_steps: int) -> int:
        """Optimizer steps of linear warm-up."""
        fraction = self.lr_warmup_fraction
        return int(fraction * decay_steps) if fraction else self.lr_warmup_iters

    @property
    def of_critic(self) -> OptimizerConfig:
        """The critic's optimizer. Every weight of the critic trains."""
        warmup = self.critic_lr_warmup_iters
        own = {
            "lr": self.lr if self.critic_lr is None else self.critic_lr,
            "lr_warmup_iters": self.lr_warmup_iters if warmup is None else warmup,
            "lr_warmup_fraction": self.lr_warmup_fraction if warmup is None else None,
        } | self.critic_overrides
        return replace(self, **own, freeze_names=None, train_names=None, critic_overrides={})

    def problems(self) -> Iterator[str]:
        if self.min_lr > self.lr:
            yield f"--min-lr {self.min_lr} is above --lr {self.lr}. Lower it."
        if self.critic_lr is not None and self.min_lr > self.critic_lr:
            yield f"--min-lr {self.min_lr} is above --critic-lr {self.critic_lr}. Lower it."
        if self.lr_warmup_fraction is not None and self.lr_warmup_iters:
            yield (
                f"--lr-warmup-fraction {self.lr_warmup_fraction} and --lr-warmup-iters "
                f"{self.lr_warmup_iters} both set the warm-up. Give one."
            )
        lists = {
            "--freeze-params-name-list": self.freeze_names or [],
            "--only-train-params-name-list": self.train_names or [],
        }
        if all(lists.values()):
            said = " and ".join(f"{name} {' '.join(names)}" for name, names in lists.items())
            yield f"{said} exclude each other. Give one."
        for name, patterns in lists.items():
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    yield f"{name} {pattern} is not a regular expression ({error}). Correct it."

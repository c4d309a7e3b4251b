"""Flags of related programs that vime does not have, each with the reason or the replacement.

A recipe for another program gets these answers instead of a hint at the nearest name.
"""

from __future__ import annotations

_NO_REPLAY = "the trainer routes tokens to experts itself"
_EXPERTS = "each expert multiplies its own tokens, without the fused kernels of TransformerEngine"
_NO_MTP = "vime does not train multi-token prediction"
_ONE_KIND = "all engines have the same flags and serve the same policy"
_OWN_ENGINES = "every run starts and stops its own engines"
_ALWAYS_WHOLE = "the trainer sends all weights to the engines directly"
_PROFILE = (
    "make bench-train-mfu PROFILE=1 shows the kernels of a GPU, and --dry-run estimates its memory"
)
_DEBUG = "--save-debug-rollout-data writes the samples of each rollout"
_ON_FAILURE = "--use-fault-tolerance checks the engines when a rollout or an update fails"

ABSENT: dict[str, str] = {
    "--use-routing-replay": _NO_REPLAY,
    "--use-rollout-routing-replay": _NO_REPLAY,
    "--moe-grouped-gemm": _EXPERTS,
    "--moe-permute-fusion": _EXPERTS,
    "--moe-token-drop-policy": "no token is dropped",
    "--mtp-num-layers": _NO_MTP,
    "--enable-mtp-training": _NO_MTP,
    "--mtp-loss-scaling-factor": _NO_MTP,
    "--vllm-config": _ONE_KIND,
    "--prefill-num-servers": _ONE_KIND,
    "--rollout-external": _OWN_ENGINES,
    "--rollout-external-engine-addrs": _OWN_ENGINES,
    "--update-weight-disk-dir": _ALWAYS_WHOLE,
    "--update-weight-delta-encoding": _ALWAYS_WHOLE,
    "--rollout-health-check-interval": _ON_FAILURE,
    "--rollout-health-check-timeout": _ON_FAILURE,
    "--rollout-health-check-first-wait": _ON_FAILURE,
    "--multimodal-keys": "prompts are text",
    "--loss-mask-type": "sft_loss finds the assistant's turns with the tokenizer's chat template",
    "--log-passrate": "evaluations always log eval/NAME-pass@k",
    "--recompute-loss-function": "--log-probs-chunk-size limits the logits in memory",
    "--reset-optimizer-states": "--no-load-optim continues with a new optimizer",
    "--dump-details": _DEBUG,
    "--save-debug-train-data": _DEBUG,
    "--wandb-key": "wandb reads WANDB_API_KEY",
    "--wandb-team": "wandb reads WANDB_ENTITY",
    "--wandb-host": "wandb reads WANDB_BASE_URL",
    "--wandb-mode": "wandb reads WANDB_MODE",
    "--wandb-dir": "wandb writes to --run-dir",
    "--tb-project-name": "--tb-dir names the folder",
    "--tb-experiment-name": "--tb-dir names the folder",
    "--profile-target": _PROFILE,
    "--record-memory-history": _PROFILE,
    "--memory-snapshot-dir": _PROFILE,
}

"""Flags of related programs that are none here, and what to do without them.

A recipe that was written for another program gets these answers in place of the nearest name.
"""

from __future__ import annotations

_NO_REPLAY = "the choices of experts are not replayed"
_NO_MTP = "heads for several tokens ahead are not trained"
_ONE_KIND = "all engines are alike and serve the one policy"
_OWN_ENGINES = "a run starts and ends its own engines"
_ALWAYS_WHOLE = "engines get all weights, straight from the trainer"
_PROFILE = (
    "make bench-train-mfu PROFILE=1 shows a GPU's kernels, and --dry-run what fills its memory"
)
_DEBUG = "--save-debug-rollout-data keeps what a step trains on"
_ON_FAILURE = "--use-fault-tolerance looks after engines when a rollout or an update fails"

ABSENT: dict[str, str] = {
    "--use-routing-replay": _NO_REPLAY,
    "--use-rollout-routing-replay": _NO_REPLAY,
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
    "--loss-mask-type": "sft_loss finds the assistant's turns with the tokenizer's own template",
    "--log-passrate": "evaluations always log eval/NAME-pass@k",
    "--recompute-loss-function": "--log-probs-chunk-size bounds the logits that exist at a time",
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

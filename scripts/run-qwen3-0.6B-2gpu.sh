#!/usr/bin/env bash
# GRPO on Qwen3-0.6B, two GPUs: one trains and one generates. Weights travel over NCCL.
#
#   bash scripts/run-qwen3-0.6B-2gpu.sh                  they take turns (train.py)
#   MODE=async bash scripts/run-qwen3-0.6B-2gpu.sh       they work in parallel (train_async.py)
#   LAUNCH=ray-job bash scripts/run-qwen3-0.6B-2gpu.sh   a job of the Ray cluster at RAY_ADDRESS
#   bash scripts/run-qwen3-0.6B-2gpu.sh --dry-run        explains the flags; starts nothing
#
# Flags given to the script override its own. Ctrl-C ends this run and nothing else.
set -euo pipefail

SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" &>/dev/null && pwd)"
REPO="$(dirname -- "${SCRIPT_DIR}")"

ROOT="${ROOT:-/root}"
HF_CHECKPOINT="${HF_CHECKPOINT:-${ROOT}/Qwen3-0.6B}"
REF_LOAD="${REF_LOAD:-${ROOT}/Qwen3-0.6B_torch_dist}"
SAVE="${SAVE:-${ROOT}/Qwen3-0.6B_vime}"
LOAD="${LOAD:-${SAVE}}"
PROMPT_DATA="${PROMPT_DATA:-${ROOT}/dapo-math-17k/dapo-math-17k.jsonl}"
EVAL_DATA="${EVAL_DATA:-${ROOT}/aime-2024/aime-2024.jsonl}"
MODE="${MODE:-sync}"

# The architecture. It is optional, and is compared with the checkpoint's config.json.
source "${SCRIPT_DIR}/models/qwen3-0.6B.sh"
source "${SCRIPT_DIR}/launch.sh"

CKPT_ARGS=(
   # vLLM starts from this folder; the tokenizer comes from it too
   --hf-checkpoint "${HF_CHECKPOINT}"
   # the reference model; a new run starts from it too
   --ref-load "${REF_LOAD}"
   # a stopped run continues from its checkpoint here, if there is one
   --load "${LOAD}"
   --save "${SAVE}"
   --save-interval 20
)

ROLLOUT_ARGS=(
   --prompt-data "${PROMPT_DATA}"
   --input-key prompt
   --label-key label
   --apply-chat-template
   --rollout-shuffle
   --rm-type deepscaler
   --num-rollout 3000
   # 32 prompts x 8 responses = 256 samples in a rollout, trained in one optimizer step
   --rollout-batch-size 32
   --n-samples-per-prompt 8
   --num-steps-per-rollout 1
   --rollout-max-response-len 4096
   --rollout-temperature 1
   --balance-data
)

EVAL_ARGS=(
   # settings that are missing here come from ROLLOUT_ARGS
   --eval-interval 5
   --eval-prompt-data aime "${EVAL_DATA}"
   --n-samples-per-eval-prompt 16
   --eval-max-response-len 8192
   --eval-top-p 1
)

PERF_ARGS=(
   --tensor-model-parallel-size 1
   --pipeline-model-parallel-size 1
   --context-parallel-size 1

   # packs of up to this many tokens; affects speed and memory, never the loss
   --use-dynamic-batch-size
   --max-tokens-per-gpu 16384
)

GRPO_ARGS=(
   --advantage-estimator grpo
   --use-kl-loss
   --kl-loss-coef 0.00
   --kl-loss-type low_var_kl
   --entropy-coef 0.00
   --eps-clip 0.2
   --eps-clip-high 0.28
)

OPTIMIZER_ARGS=(
   --optimizer adam
   --lr 1e-6
   --lr-decay-style constant
   --weight-decay 0.1
   --adam-beta1 0.9
   --adam-beta2 0.98
)

VLLM_ARGS=(
   --rollout-num-gpus-per-engine 1
   --vllm-gpu-memory-utilization 0.9
)

CLUSTER_ARGS=(
   --actor-num-nodes 1
   --actor-num-gpus-per-node 1
   --rollout-num-gpus 1
)

case "${MODE}" in
   sync)
      ENTRY=train.py
      ;;
   async)
      ENTRY=train_async.py
      # the samples come from weights that are one update older than the trainer's
      GRPO_ARGS+=(--use-rollout-logprobs)
      ;;
   *)
      echo "MODE=${MODE} is unknown. Use sync or async." >&2
      exit 2
      ;;
esac

launch "${ENTRY}" \
   "${CLUSTER_ARGS[@]}" "${MODEL_ARGS[@]}" "${CKPT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${EVAL_ARGS[@]}" \
   "${PERF_ARGS[@]}" "${GRPO_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" "${VLLM_ARGS[@]}" "$@"

#!/usr/bin/env bash
# GRPO on Qwen3-4B, one node of 8 GPUs or several.
#
#   bash scripts/run-qwen3-4B.sh                        all 8 train and generate in turn (train.py)
#   MODE=decoupled bash scripts/run-qwen3-4B.sh         2 train, 6 generate, they take turns
#   MODE=async bash scripts/run-qwen3-4B.sh             the same, in parallel (train_async.py)
#   NUM_NODES=2 bash scripts/run-qwen3-4B.sh            on two nodes of the Ray cluster at RAY_ADDRESS
#   LAUNCH=ray-job bash scripts/run-qwen3-4B.sh         a job of the Ray cluster at RAY_ADDRESS
#   bash scripts/run-qwen3-4B.sh --dry-run              explains the flags; starts nothing
#
# Flags given to the script override its own. Ctrl-C ends this run and nothing else. docs/clusters.md
# explains clusters.
set -euo pipefail

SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" &>/dev/null && pwd)"
REPO="$(dirname -- "${SCRIPT_DIR}")"

ROOT="${ROOT:-/root}"
HF_CHECKPOINT="${HF_CHECKPOINT:-${ROOT}/Qwen3-4B}"
REF_LOAD="${REF_LOAD:-${ROOT}/Qwen3-4B_torch_dist}"
SAVE="${SAVE:-${ROOT}/Qwen3-4B_vime}"
LOAD="${LOAD:-${SAVE}}"
PROMPT_DATA="${PROMPT_DATA:-${ROOT}/dapo-math-17k/dapo-math-17k.jsonl}"
EVAL_DATA="${EVAL_DATA:-${ROOT}/aime-2024/aime-2024.jsonl}"
MODE="${MODE:-colocated}"
NUM_NODES="${NUM_NODES:-1}"
GPUS_PER_NODE="${GPUS_PER_NODE:-8}"
# These apply if GPUs are not shared: TRAIN_GPUS on each of TRAIN_NODES train, the others generate.
TRAIN_NODES="${TRAIN_NODES:-${NUM_NODES}}"
TRAIN_GPUS="${TRAIN_GPUS:-2}"
ROLLOUT_GPUS="${ROLLOUT_GPUS:-$((NUM_NODES * GPUS_PER_NODE - TRAIN_NODES * TRAIN_GPUS))}"

# The architecture. It is optional, and is compared with the checkpoint's config.json.
source "${SCRIPT_DIR}/models/qwen3-4B.sh"
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
   --rollout-max-response-len 8192
   --rollout-temperature 1
   --balance-data
)

EVAL_ARGS=(
   # settings that are missing here come from ROLLOUT_ARGS
   --eval-interval 5
   --eval-prompt-data aime "${EVAL_DATA}"
   --n-samples-per-eval-prompt 16
   --eval-max-response-len 16384
   --eval-top-p 1
)

PERF_ARGS=(
   --tensor-model-parallel-size 2
   --sequence-parallel
   --pipeline-model-parallel-size 1
   --context-parallel-size 1
   --expert-model-parallel-size 1
   --expert-tensor-parallel-size 1

   --recompute-granularity full
   --recompute-method uniform
   --recompute-num-layers 1

   # packs of up to this many tokens; affects speed and memory, never the loss
   --use-dynamic-batch-size
   --max-tokens-per-gpu 9216
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
   --rollout-num-gpus-per-engine 2
   --vllm-gpu-memory-utilization 0.7
)

CLUSTER_ARGS=(--num-gpus-per-node "${GPUS_PER_NODE}")
ENTRY=train.py
case "${MODE}" in
   colocated)
      CLUSTER_ARGS+=(--actor-num-nodes "${NUM_NODES}" --actor-num-gpus-per-node "${GPUS_PER_NODE}" --colocate)
      ;;
   decoupled | async)
      CLUSTER_ARGS+=(--actor-num-nodes "${TRAIN_NODES}" --actor-num-gpus-per-node "${TRAIN_GPUS}")
      CLUSTER_ARGS+=(--rollout-num-gpus "${ROLLOUT_GPUS}")
      ;;
   *)
      echo "MODE=${MODE} is unknown. Use colocated, decoupled or async." >&2
      exit 2
      ;;
esac
if [[ "${MODE}" == async ]]; then
   ENTRY=train_async.py
   # the samples come from weights that are one update older than the trainer's
   GRPO_ARGS+=(--use-rollout-logprobs)
fi

launch "${ENTRY}" \
   "${CLUSTER_ARGS[@]}" "${MODEL_ARGS[@]}" "${CKPT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${EVAL_ARGS[@]}" \
   "${PERF_ARGS[@]}" "${GRPO_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" "${VLLM_ARGS[@]}" "$@"

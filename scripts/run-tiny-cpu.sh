#!/usr/bin/env bash
# The GRPO of the quickstart: a tiny Qwen3 learns addition on a machine without a GPU.
#
#   bash scripts/run-tiny-cpu.sh                 trainer and engine take turns (train.py)
#   MODE=async bash scripts/run-tiny-cpu.sh      they work in parallel (train_async.py)
#   bash scripts/run-tiny-cpu.sh --dry-run       explains the flags; starts nothing
#
# Flags given to the script override its own. Ctrl-C ends this run and nothing else.
set -euo pipefail

SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" &>/dev/null && pwd)"
REPO="$(dirname -- "${SCRIPT_DIR}")"

RUN_DIR="${RUN_DIR:-${REPO}/runs/quickstart}"
HF_CHECKPOINT="${HF_CHECKPOINT:-${RUN_DIR}/warm/hf}"
REF_LOAD="${REF_LOAD:-${RUN_DIR}/warm/torch_dist}"
SAVE="${SAVE:-${RUN_DIR}/grpo}"
LOAD="${LOAD:-${SAVE}}"
PROMPT_DATA="${PROMPT_DATA:-${RUN_DIR}/data/train.jsonl}"
EVAL_DATA="${EVAL_DATA:-${RUN_DIR}/data/eval.jsonl}"
PYTHON="${PYTHON:-${REPO}/.venv/bin/python}"
MODE="${MODE:-sync}"
NUM_ROLLOUT="${NUM_ROLLOUT:-60}"
SEED="${SEED:-1}"

source "${SCRIPT_DIR}/models/qwen3-tiny.sh"

CKPT_ARGS=(
   --hf-checkpoint "${HF_CHECKPOINT}"
   --ref-load "${REF_LOAD}"
   --load "${LOAD}"
   --save "${SAVE}"
   --save-interval 20
   --run-dir "${RUN_DIR}"
)

ROLLOUT_ARGS=(
   --prompt-data "${PROMPT_DATA}"
   --input-key prompt
   --label-key label
   --apply-chat-template
   --rollout-shuffle
   --rollout-seed "${SEED}"
   --rm-type math
   --num-rollout "${NUM_ROLLOUT}"
   # 32 prompts x 8 responses = 256 samples in a rollout, trained in one optimizer step
   --rollout-batch-size 32
   --n-samples-per-prompt 8
   --num-steps-per-rollout 1
   --rollout-max-response-len 48
   --rollout-temperature 1
   --balance-data
)

EVAL_ARGS=(
   --eval-interval 5
   --eval-prompt-data addition "${EVAL_DATA}"
   --n-samples-per-eval-prompt 4
)

PERF_ARGS=(
   --tensor-model-parallel-size 1
   --pipeline-model-parallel-size 1
   --context-parallel-size 1
   --use-dynamic-batch-size
   --max-tokens-per-gpu 8192
)

GRPO_ARGS=(
   --advantage-estimator grpo
   --use-kl-loss
   --kl-loss-coef 0.00
   --kl-loss-type low_var_kl
   --entropy-coef 0.00
   --eps-clip 0.2
   --eps-clip-high 0.28
   --seed "${SEED}"
)

OPTIMIZER_ARGS=(
   --optimizer adam
   --lr 3e-4
   --lr-decay-style constant
   --lr-warmup-iters 3
   --weight-decay 0
   --adam-beta1 0.9
   --adam-beta2 0.95
   --clip-grad 1
)

VLLM_ARGS=(
   --rollout-num-gpus-per-engine 1
)

# Without GPUs, one CPU slot stands for one GPU.
case "${MODE}" in
   sync)
      ENTRY=train.py
      CLUSTER_ARGS=(--actor-num-nodes 1 --actor-num-gpus-per-node 1 --colocate)
      ;;
   async)
      ENTRY=train_async.py
      CLUSTER_ARGS=(--actor-num-nodes 1 --actor-num-gpus-per-node 1 --rollout-num-gpus 1)
      # the samples come from weights that are one update older than the trainer's
      GRPO_ARGS+=(--use-rollout-logprobs)
      ;;
   *)
      echo "MODE=${MODE} is unknown. Use sync or async." >&2
      exit 2
      ;;
esac

exec "${PYTHON}" "${REPO}/${ENTRY}" \
   "${CLUSTER_ARGS[@]}" "${MODEL_ARGS[@]}" "${CKPT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${EVAL_ARGS[@]}" \
   "${PERF_ARGS[@]}" "${GRPO_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" "${VLLM_ARGS[@]}" "$@"

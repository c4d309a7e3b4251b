#!/usr/bin/env bash
# SmolLM2-135M-Instruct learns arithmetic step by step with GRPO: one GPU, a quarter of an hour.
#
#   HF_CHECKPOINT=/root/SmolLM2-135M-Instruct bash examples/arithmetic/run-smollm2-1gpu.sh
#   bash examples/arithmetic/run-smollm2-1gpu.sh --dry-run    explains the flags; starts nothing
#
# Flags given to the script override its own. Ctrl-C ends this run and nothing else. The same command
# continues the run from its last checkpoint.
set -euo pipefail

HERE="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" &>/dev/null && pwd)"
REPO="$(cd -- "${HERE}/../.." &>/dev/null && pwd)"

ROOT="${ROOT:-/root}"
RUN_DIR="${RUN_DIR:-${REPO}/runs/arithmetic}"
HF_CHECKPOINT="${HF_CHECKPOINT:-${ROOT}/SmolLM2-135M-Instruct}"
DATA="${DATA:-${RUN_DIR}/data}"
SAVE="${SAVE:-${RUN_DIR}/grpo}"
LOAD="${LOAD:-${SAVE}}"
export PYTHONPATH="${REPO}${PYTHONPATH:+:${PYTHONPATH}}"

source "${REPO}/scripts/models/smollm2-135M.sh"
source "${REPO}/scripts/launch.sh"

if [[ ! -f "${DATA}/train.jsonl" ]]; then
   "${PYTHON:-python3}" -m examples.arithmetic.make "${DATA}"
fi

CKPT_ARGS=(
   # weights and tokenizer; without a KL term there is no reference model
   --hf-checkpoint "${HF_CHECKPOINT}"
   --load "${LOAD}"
   --save "${SAVE}"
   --save-interval 50
   --keep-last 1
   --run-dir "${RUN_DIR}"
)

ROLLOUT_ARGS=(
   --prompt-data "${DATA}/train.jsonl"
   --input-key prompt
   --label-key label
   --apply-chat-template
   --metadata-key metadata
   --custom-rm-path examples.arithmetic.reward.grade
   --num-rollout 130
   # 64 prompts x 16 responses = 1024 samples in a rollout. At the start a right digit is rare,
   # and a group learns it only if one of its samples finds it.
   --rollout-batch-size 64
   --n-samples-per-prompt 16
   # four optimizer steps for each rollout, because generation costs as much as training here; the
   # clip range limits how far the last step's policy is from the policy that made the samples
   --num-steps-per-rollout 4
   --rollout-max-response-len 96
   # above 1, because equal samples teach nothing
   --rollout-temperature 1.2
   --balance-data
)

EVAL_ARGS=(
   # 256 held-out problems in each file, solved once, greedily
   --eval-interval 10 --eval-prompt-data two_digits "${DATA}/two_digits.jsonl" three_digits
   "${DATA}/three_digits.jsonl" --eval-temperature 0
)

PERF_ARGS=(
   --tensor-model-parallel-size 1
   --use-dynamic-batch-size
   --max-tokens-per-gpu 32768
)

GRPO_ARGS=(
   # the rarer a right token, the more it counts (MaxRL, arXiv:2602.02710)
   --advantage-estimator maxrl
   # each token up to a sample's first mistake is compared with tokens after the same beginning
   --custom-reward-post-process-path examples.arithmetic.reward.compare_tokens
   --custom-advantage-function-path examples.arithmetic.reward.token_advantages
   --calculate-per-token-loss
   --entropy-coef 0.00
   # the wider upper bound keeps rare right answers growing (DAPO, arXiv:2503.14476)
   --eps-clip 0.2
   --eps-clip-high 0.28
)

OPTIMIZER_ARGS=(
   # A small model tolerates a higher rate than the 1e-6 of a 4B model. Twice this rate makes the
   # samples equal before the model is right. A rate that falls to 0 gives better results
   # (docs/performance.md).
   --optimizer adam
   --lr 2.5e-5
   --lr-decay-style linear
   --lr-warmup-iters 10
   --weight-decay 0
   --adam-beta1 0.9
   --adam-beta2 0.95
   --clip-grad 1
)

VLLM_ARGS=(
   --rollout-num-gpus-per-engine 1
   --vllm-gpu-memory-utilization 0.4
   --vllm-max-model-len 1024
   --vllm-max-num-seqs 1024
)

CLUSTER_ARGS=(
   --actor-num-nodes 1
   --actor-num-gpus-per-node 1
   --colocate
   # the trainer's 2 GB stay on the GPU while the engine works
   --no-offload-train
)

launch train.py \
   "${CLUSTER_ARGS[@]}" "${MODEL_ARGS[@]}" "${CKPT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${EVAL_ARGS[@]}"
   \ "${PERF_ARGS[@]}" "${GRPO_ARGS[@]}" "${OPTIMIZER_ARGS[@]}" "${VLLM_ARGS[@]}" "$@"

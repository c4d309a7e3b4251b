#!/usr/bin/env bash
# A tiny model learns to use a calculator. It takes some minutes and needs no GPU.
#
#   bash examples/calculator/run.sh                     writes to runs/calculator
#   RUN_DIR=/tmp/calc NUM_ROLLOUT=5 bash examples/calculator/run.sh
#
# Flags given to the script go to the GRPO run and override its own.
set -euo pipefail

HERE="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" &>/dev/null && pwd)"
REPO="$(cd -- "${HERE}/../.." &>/dev/null && pwd)"
PYTHON="${PYTHON:-${REPO}/.venv/bin/python}"
RUN_DIR="${RUN_DIR:-${REPO}/runs/calculator}"
NUM_ROLLOUT="${NUM_ROLLOUT:-20}"
SFT_STEPS="${SFT_STEPS:-300}"
export PYTHONPATH="${REPO}${PYTHONPATH:+:${PYTHONPATH}}"

MODEL="${RUN_DIR}/sft/hf/$((SFT_STEPS - 1))"
cd "${REPO}"

if [[ ! -f "${RUN_DIR}/data/blank/config.json" ]]; then
   "${PYTHON}" -m examples.calculator.make "${RUN_DIR}/data"
fi

if [[ ! -f "${MODEL}/config.json" ]]; then
   "${PYTHON}" train.py \
      --loss-type sft_loss --calculate-per-token-loss --debug-train-only \
      --rollout-function-path vime.rollout.sft_rollout.generate_rollout \
      --hf-checkpoint "${RUN_DIR}/data/blank" \
      --prompt-data "${RUN_DIR}/data/sft.jsonl" --input-key messages --apply-chat-template \
      --num-rollout "${SFT_STEPS}" --rollout-batch-size 32 \
      --use-dynamic-batch-size --max-tokens-per-gpu 4096 --actor-num-gpus-per-node 1 \
      --lr 3e-3 --lr-warmup-iters 20 --weight-decay 0 --adam-beta2 0.95 \
      --save-interval "${SFT_STEPS}" --save-hf "${RUN_DIR}/sft/hf/{rollout_id}" \
      --run-dir "${RUN_DIR}/sft"
fi

exec "${PYTHON}" train.py \
   --hf-checkpoint "${MODEL}" \
   --custom-generate-function-path examples.calculator.environment.generate_with_calculator \
   --custom-rm-path examples.calculator.environment.reward \
   --prompt-data "${RUN_DIR}/data/train.jsonl" --input-key prompt --label-key label \
   --apply-chat-template --rollout-shuffle \
   --num-rollout "${NUM_ROLLOUT}" --rollout-batch-size 16 --n-samples-per-prompt 8 \
   --rollout-max-response-len 64 \
   --eval-interval 10 --eval-prompt-data calculator "${RUN_DIR}/data/eval.jsonl" \
   --advantage-estimator grpo --lr 3e-4 --weight-decay 0 --adam-beta2 0.95 \
   --use-dynamic-batch-size --max-tokens-per-gpu 8192 \
   --actor-num-gpus-per-node 1 --colocate \
   --run-dir "${RUN_DIR}/grpo" "$@"

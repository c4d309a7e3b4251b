# Qwen3-235B-A22B (arXiv:2505.09388), in Megatron's flags.
MODEL_ARGS=(
   --num-layers 94
   --hidden-size 4096
   --ffn-hidden-size 12288
   --num-attention-heads 64
   --group-query-attention
   --num-query-groups 4
   --kv-channels 128
   --qk-layernorm
   --swiglu
   --disable-bias-linear
   --normalization RMSNorm
   --norm-epsilon 1e-6
   --use-rotary-position-embeddings
   --rotary-base 1000000
   --vocab-size 151936
   --untie-embeddings-and-output-weights
   --num-experts 128
   --moe-layer-freq "([1]*94)"
   --moe-ffn-hidden-size 1536
   --moe-router-topk 8
   --moe-router-score-function softmax
   --moe-router-dtype fp32
)

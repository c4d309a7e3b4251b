# GLM-4-32B-0414 (arXiv:2406.12793), in Megatron's flags.
MODEL_ARGS=(
   --num-layers 61
   --hidden-size 6144
   --ffn-hidden-size 23040
   --num-attention-heads 48
   --group-query-attention
   --num-query-groups 2
   --kv-channels 128
   --post-self-attn-layernorm
   --post-mlp-layernorm
   --swiglu
   --disable-bias-linear
   --normalization RMSNorm
   --norm-epsilon 1e-5
   --use-rotary-position-embeddings
   --rotary-base 10000
   --rotary-percent 0.5
   --rotary-interleaved
   --vocab-size 151552
   --untie-embeddings-and-output-weights
)

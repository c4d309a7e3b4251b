# Qwen2.5-32B (arXiv:2412.15115), in Megatron's flags.
# Its norms' epsilon is 1e-5 in the base model and 1e-6 in Instruct: config.json decides.
MODEL_ARGS=(
   --num-layers 64
   --hidden-size 5120
   --ffn-hidden-size 27648
   --num-attention-heads 40
   --group-query-attention
   --num-query-groups 8
   --kv-channels 128
   --add-qkv-bias
   --swiglu
   --disable-bias-linear
   --normalization RMSNorm
   --use-rotary-position-embeddings
   --rotary-base 1000000
   --vocab-size 152064
   --untie-embeddings-and-output-weights
)

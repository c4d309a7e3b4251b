# The quickstart's Qwen3 of 0.7 million parameters, in Megatron's flags.
MODEL_ARGS=(
   --num-layers 3
   --hidden-size 128
   --ffn-hidden-size 384
   --num-attention-heads 4
   --kv-channels 32
   --qk-layernorm
   --swiglu
   --disable-bias-linear
   --normalization RMSNorm
   --norm-epsilon 1e-6
   --use-rotary-position-embeddings
   --rotary-base 10000
   --vocab-size 288
)

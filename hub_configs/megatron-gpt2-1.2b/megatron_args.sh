# The arguments with which Megatron-LM core_v0.16 builds Megatron-LM GPT-2 1.2B,
# in the layout it had: TP1 x PP1, 1 GPUs for one replica.
#
#     source hub_configs/megatron-gpt2-1.2b/megatron_args.sh
#     torchrun ... pretrain_gpt.py "${MEGATRON_ARGS[@]}" --data-path ...
#
# What they leave to you is the training: batch, learning rate, data, checkpoints.
MEGATRON_ARGS=(
    --num-layers 40
    --hidden-size 1536
    --ffn-hidden-size 6144
    --num-attention-heads 16
    --kv-channels 96
    --max-position-embeddings 1024
    --seq-length 1024
    --position-embedding-type learned_absolute
    --normalization LayerNorm
    --attention-dropout 0.1
    --hidden-dropout 0.1
    --init-method-std 0.02
    --make-vocab-size-divisible-by 128
    --padded-vocab-size 50304
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 1
    --transformer-impl transformer_engine
    --norm-epsilon 1e-05
    --fp16
    --tokenizer-type GPT2BPETokenizer --vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt
)

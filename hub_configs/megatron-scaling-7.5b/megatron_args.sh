# The arguments with which Megatron-LM core_v0.16 builds Megatron-LM GPT 7.5B of the scaling study,
# in the layout it had: TP4 x PP1, 4 GPUs for one replica.
#
#     source hub_configs/megatron-scaling-7.5b/megatron_args.sh
#     torchrun ... pretrain_gpt.py "${MEGATRON_ARGS[@]}" --data-path ...
#
# What they leave to you is the training: batch, learning rate, data, checkpoints.
MEGATRON_ARGS=(
    --num-layers 36
    --hidden-size 4096
    --ffn-hidden-size 16384
    --num-attention-heads 32
    --kv-channels 128
    --max-position-embeddings 2048
    --seq-length 2048
    --position-embedding-type learned_absolute
    --normalization LayerNorm
    --attention-dropout 0.1
    --hidden-dropout 0.1
    --init-method-std 0.02
    --make-vocab-size-divisible-by 128
    --padded-vocab-size 51200
    --tensor-model-parallel-size 4
    --pipeline-model-parallel-size 1
    --transformer-impl transformer_engine
    --norm-epsilon 1e-05
    --fp16
    --tokenizer-type GPT2BPETokenizer --vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt
)

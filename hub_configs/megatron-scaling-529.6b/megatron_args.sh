# The arguments with which Megatron-LM core_v0.16 builds Megatron-LM GPT 529.6B of the scaling study,
# in the layout it had: TP8 x PP35 x VPP3, 280 GPUs for one replica.
#
#     source hub_configs/megatron-scaling-529.6b/megatron_args.sh
#     torchrun ... pretrain_gpt.py "${MEGATRON_ARGS[@]}" --data-path ...
#
# What they leave to you is the training: batch, learning rate, data, checkpoints.
MEGATRON_ARGS=(
    --num-layers 105
    --hidden-size 20480
    --ffn-hidden-size 81920
    --num-attention-heads 128
    --kv-channels 160
    --max-position-embeddings 2048
    --seq-length 2048
    --position-embedding-type learned_absolute
    --normalization LayerNorm
    --attention-dropout 0.1
    --hidden-dropout 0.1
    --init-method-std 0.02
    --make-vocab-size-divisible-by 128
    --padded-vocab-size 51200
    --tensor-model-parallel-size 8
    --pipeline-model-parallel-size 35
    --transformer-impl transformer_engine
    --norm-epsilon 1e-05
    --num-layers-per-virtual-pipeline-stage 1
    --fp16
    --tokenizer-type GPT2BPETokenizer --vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt
)

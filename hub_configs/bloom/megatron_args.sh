# The arguments with which BigScience's Megatron-DeepSpeed builds BLOOM,
# in the layout it had: TP4 x PP12, 48 GPUs for one replica.
#
#     source hub_configs/bloom/megatron_args.sh
#     torchrun ... pretrain_gpt.py "${MEGATRON_ARGS[@]}" --data-path ...
#
# What they leave to you is the training: batch, learning rate, data, checkpoints.
MEGATRON_ARGS=(
    --num-layers 70
    --hidden-size 14336
    --num-attention-heads 112
    --seq-length 2048
    --max-position-embeddings 2048
    --position-embedding-type alibi
    --init-method-std 0.0048
    --pad-vocab-size-to 250880
    --tensor-model-parallel-size 4
    --pipeline-model-parallel-size 12
    --tokenizer-type PretrainedFromHF
    --tokenizer-name-or-path bigscience/tokenizer
    --pp-partition-method 'type:transformer|embedding'
    --embed-layernorm
    --bf16
)

# The arguments with which BigScience's Megatron-DeepSpeed builds BLOOM 7B1,
# in the layout it had: TP4 x PP4, 16 GPUs for one replica.
#
#     source hub_configs/bloom-7b1/megatron_args.sh
#     torchrun ... pretrain_gpt.py "${MEGATRON_ARGS[@]}" --data-path ...
#
# What they leave to you is the training: batch, learning rate, data, checkpoints.
MEGATRON_ARGS=(
    --num-layers 30
    --hidden-size 4096
    --num-attention-heads 32
    --seq-length 2048
    --max-position-embeddings 2048
    --position-embedding-type alibi
    --init-method-std 0.0048
    --pad-vocab-size-to 250880
    --tensor-model-parallel-size 4
    --pipeline-model-parallel-size 4
    --tokenizer-type PretrainedFromHF
    --tokenizer-name-or-path bigscience/tokenizer
    --pp-partition-method 'type:transformer|embedding'
    --embed-layernorm
    --fp16
)

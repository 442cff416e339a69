# The arguments with which BigScience's Megatron-DeepSpeed builds BLOOM 1B1,
# in the layout it had: TP1 x PP2, 2 GPUs for one replica.
#
#     source hub_configs/bloom-1b1/megatron_args.sh
#     torchrun ... pretrain_gpt.py "${MEGATRON_ARGS[@]}" --data-path ...
#
# What they leave to you is the training: batch, learning rate, data, checkpoints.
MEGATRON_ARGS=(
    --num-layers 24
    --hidden-size 1536
    --num-attention-heads 16
    --seq-length 2048
    --max-position-embeddings 2048
    --position-embedding-type alibi
    --init-method-std 0.0048
    --pad-vocab-size-to 250880
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 2
    --tokenizer-type PretrainedFromHF
    --tokenizer-name-or-path bigscience/tokenizer
    --pp-partition-method 'type:transformer|embedding'
    --embed-layernorm
    --fp16
)

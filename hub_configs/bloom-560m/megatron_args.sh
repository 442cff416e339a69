# The arguments with which BigScience's Megatron-DeepSpeed builds BLOOM 560M,
# in the layout it had: TP1 x PP1, 1 GPUs for one replica.
#
#     source hub_configs/bloom-560m/megatron_args.sh
#     torchrun ... pretrain_gpt.py "${MEGATRON_ARGS[@]}" --data-path ...
#
# What they leave to you is the training: batch, learning rate, data, checkpoints.
MEGATRON_ARGS=(
    --num-layers 24
    --hidden-size 1024
    --num-attention-heads 16
    --seq-length 2048
    --max-position-embeddings 2048
    --position-embedding-type alibi
    --init-method-std 0.0048
    --pad-vocab-size-to 250880
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 1
    --tokenizer-type PretrainedFromHF
    --tokenizer-name-or-path bigscience/tokenizer
    --embed-layernorm
    --fp16
)

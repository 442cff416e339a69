"""EPFL's Megatron-LLM: a model of Megatron's, written as that program writes it, computes the same.

Laid out here from its converter's rules: [up | gate], queries and keys of neighbours, a bare head.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mtt_convert import UnsupportedError, convert, open_checkpoint
from mtt_convert.logits import compare_logits

Golden = Callable[[str], Path]
HEAD_DIM, GROUP = 4, 2
ARGS = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_attention_heads_kv": 2,
    "ffn_hidden_size": 24,
    "parallel_attn": False,
    "glu_activation": "swiglu",
    "padded_vocab_size": 128,
    "use_rms_norm": True,
    "tie_embed_logits": False,
    "max_position_embeddings": 16,
    "seq_length": 16,
    "layernorm_epsilon": 1e-6,
    "pipeline_model_parallel_size": 1,
    "iteration": "release",
    "bias_gelu_fusion": False,
    "position_embedding_type": "rotary",
}


def neighbours(qkv: torch.Tensor) -> torch.Tensor:
    """Rows of queries and keys so that what was i and i + d/2 stands side by side."""
    heads = list(qkv.split(HEAD_DIM))
    for number, head in enumerate(heads):
        if number % (GROUP + 2) != GROUP + 1:  # all but the values
            heads[number] = head.view(2, HEAD_DIM // 2, -1).transpose(0, 1).reshape(head.shape)
    return torch.cat(heads)


def write(golden: Golden, root: Path, tp: int, **args: object) -> Path:
    """The tiny golden model as Megatron-LLM's `release`."""
    whole = load_file(golden("mcore/tiny/reference_megatron.safetensors"))
    # The reference is of tensor-parallel rank sizes times two: whole tensors.
    for rank in range(tp):

        def cut(name: str, axis: int | None, rank: int = rank) -> torch.Tensor:
            return whole[name] if axis is None else whole[name].chunk(tp, axis)[rank].clone()

        transformer = {"final_layernorm.weight": cut("decoder.final_layernorm.weight", None)}
        for layer in range(2):
            old, new = f"decoder.layers.{layer}", f"layers.{layer}"
            gate, up = whole[f"{old}.mlp.linear_fc1.weight"].chunk(2)
            parts = [up.chunk(tp)[rank], gate.chunk(tp)[rank]]
            qkv = cut(f"{old}.self_attention.linear_qkv.weight", 0)
            transformer |= {
                f"{new}.input_layernorm.weight": cut(f"{old}.input_layernorm.weight", None),
                f"{new}.attention.query_key_value.weight": neighbours(qkv),
                f"{new}.attention.dense.weight": cut(f"{old}.self_attention.linear_proj.weight", 1),
                f"{new}.post_attention_layernorm.weight": cut(
                    f"{old}.pre_mlp_layernorm.weight", None
                ),
                f"{new}.mlp.dense_h_to_4h.weight": torch.cat(parts),
                f"{new}.mlp.dense_4h_to_h.weight": cut(f"{old}.mlp.linear_fc2.weight", 1),
            }
        model = {
            "embedding": {"word_embeddings.weight": cut("embedding.word_embeddings.weight", 0)},
            "transformer": transformer,
            "lm_head": cut("output_layer.weight", 0),
        }
        content = {
            "iteration": "release",
            "model": {"language_model": model},
            "checkpoint_version": 3.0,
            "args": Namespace(**{**ARGS, "tensor_model_parallel_size": tp, **args}),
        }
        folder = root / "release" / f"mp_rank_{rank:02d}"
        folder.mkdir(parents=True)
        torch.save(content, folder / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("release")
    return root


@pytest.mark.parametrize("tp", [1, 2])
def test_it_computes_what_megatron_computes(tp: int, golden: Golden, tmp_path: Path) -> None:
    root = write(golden, tmp_path / "ckpt", tp)
    convert(root, tmp_path / "out", tokenizer="none")
    assert compare_logits(tmp_path / "out", golden("mcore/tiny/logits.npz")) < 1e-4
    checkpoint = open_checkpoint(root)
    assert checkpoint.architecture.rotary_interleaved
    assert "Megatron-LLM" in "; ".join(checkpoint.evidence)


def test_halves_would_show(golden: Golden, tmp_path: Path) -> None:
    """The same rows taken for Megatron's give other logits."""
    root = write(golden, tmp_path / "ckpt", 1)
    convert(root, tmp_path / "out", tokenizer="none")
    config = tmp_path / "out" / "config.json"
    text = config.read_text()
    assert '"rope_interleave": true' in text
    config.write_text(text.replace('"rope_interleave": true', '"rope_interleave": false'))
    assert compare_logits(tmp_path / "out", golden("mcore/tiny/logits.npz")) > 1e-3


@pytest.mark.parametrize(
    "odd",
    [{"parallel_attn": True}, {"sliding_window_size": 4096}, {"glu_activation": None}],
    ids=str,
)
def test_other_models_are_refused(odd: dict, golden: Golden, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=next(iter(odd))):
        open_checkpoint(write(golden, tmp_path / "ckpt", 1, **odd))

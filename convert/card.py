"""`README.md` of a Hugging Face folder: what the model is, where it came from, how to load it."""

from __future__ import annotations

from dataclasses import replace

from .architecture import Architecture
from .card_bert import bert_class, bert_python, bert_rows
from .checkpoint import Checkpoint
from .families import Family
from .layouts import tensor_parallel_sizes
from .manifest import NAME as MANIFEST
from .parameters import num_active_parameters
from .tokenizer import Tokenizer
from .version import __version__

_TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForPreTraining": "fill-mask",
}
_MOST_GPUS = 8  # of the example: those of one machine
Rows = list[tuple[str, object]]


def model_card(
    checkpoint: Checkpoint,
    family: Family,
    architecture: Architecture,
    num_parameters: int,
    dtype: str,
    tokenizer: Tokenizer,
) -> bytes:
    """The card, with the metadata that the Hub reads; its license is the publisher's to fill in.

    Args:
        checkpoint: where the weights come from.
        family: the class that is written.
        architecture: the model, with the vocabulary that is written.
        num_parameters: elements of all tensors that are written.
        dtype: the element type most of them have.
        tokenizer: what is written of it.
    """
    has_code = family.code is not None
    title = "Megatron-Turing model" if has_code else family.causal_lm
    example, several = _python(family, tokenizer), _several(architecture, family)
    if architecture.kind == "bert":
        title = bert_class(architecture)
        example, several = bert_python(architecture, tokenizer), ""
    text = f"""\
---
# license: fill in the identifier of yours, see https://huggingface.co/docs/hub/repositories-licenses
library_name: transformers
pipeline_tag: {_TASKS[family.auto_class]}
tags:
{_list(_tags(checkpoint, family))}
---

# {title}

{table(_model_rows(architecture, num_parameters, dtype))}

## Origin

{table(_origin_rows(checkpoint))}

`{MANIFEST}` has a hash of every tensor and file, with which `mtt verify FOLDER` compares them.

## Use

On one GPU, or on a CPU:

```python
{example}
```
{_CODE_NOTE if has_code else ""}
{several}
## License

To be filled in by whoever publishes this model.
"""
    return text.encode()


def _tags(checkpoint: Checkpoint, family: Family) -> list[str]:
    own = "mtt" if family.code is not None else family.name
    return [own] if checkpoint.config else [own, "megatron"]


def _list(items: list[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def table(rows: Rows) -> str:
    """Label and value in Markdown, a line each; empty values are left out."""
    lines = [f"| {name} | {value} |" for name, value in rows if value not in (None, "")]
    return "\n".join(["| | |", "|---|---|", *lines])


def _model_rows(a: Architecture, num_parameters: int, dtype: str) -> Rows:
    gate = ", gated" if a.gated_linear_unit else ""
    centred = ", weights stored minus one" if a.layernorm_zero_centered_gamma else ""
    biases = "all linear layers" if a.add_bias_linear else "queries, keys and values"
    written = replace(a, padded_vocab_size=a.vocab_size or a.padded_vocab_size)
    return [
        ("Parameters", f"{num_parameters:,}"),
        ("Parameters that a token uses", active_text(written)),
        ("Encoder layers", a.encoder_num_layers or None),
        ("Decoder layers" if a.encoder_num_layers else "Layers", a.num_layers),
        ("Hidden size", a.hidden_size),
        ("MLP size", f"{a.ffn_hidden_size}{gate}"),
        ("Experts", experts_text(a)),
        ("Attention heads", f"{a.num_attention_heads} of {a.kv_channels}"),
        ("Key/value heads", None if a.multi_latent_attention else a.num_query_groups),
        ("Latents", latents_text(a)),
        ("Norm of queries and keys", "yes" if a.qk_layernorm else None),
        ("Activation", a.activation),
        ("Norm", f"{a.normalization}, epsilon {a.layernorm_epsilon:g}{centred}"),
        ("Norm after the last layers", None if a.final_layernorm else "none"),
        ("Norm after the embedding", "yes" if a.embedding_norm else None),
        ("Residuals", _residuals(a)),
        ("Biases", biases if a.has_qkv_bias else "none"),
        ("Positions", _positions(a)),
        ("Window", _window(a)),
        ("Vocabulary", f"{a.vocab_size or a.padded_vocab_size:,}"),
        *bert_rows(a),
        ("Layers that predict further tokens", a.mtp_num_layers or None),
        ("Head", "its own" if a.untie_embeddings_and_output_weights else "tied to the embedding"),
        ("Element type", dtype),
    ]


def _residuals(a: Architecture) -> str | None:
    if not a.parallel_residual:
        return None
    return "parallel, of one norm" if a.shared_layernorm else "parallel"


def experts_text(a: Architecture) -> str | None:
    """Experts, how many of them a token goes to, and what chooses them; None for a dense model."""
    if a.num_experts is None:
        return None
    scores = "softmax of all" if a.moe_router_pre_softmax else a.moe_router_score_function
    facts = [
        f"{a.moe_router_topk} of {a.num_experts} by {scores}",
        f"each of {a.moe_ffn_hidden_size}",
        f"in {sum(a.moe_layers)} of {a.num_layers} layers",
    ]
    if a.moe_router_num_groups is not None:
        facts.append(f"{a.moe_router_group_topk} of {a.moe_router_num_groups} groups")
    if a.moe_router_topk_scaling_factor is not None:
        facts.append(f"weights times {a.moe_router_topk_scaling_factor:g}")
    if a.moe_shared_expert_intermediate_size is not None:
        gate = ", gated" if a.moe_shared_expert_gate else ""
        facts.append(f"a shared MLP of {a.moe_shared_expert_intermediate_size}{gate}")
    return ", ".join(facts)


def latents_text(a: Architecture) -> str | None:
    """Sizes of latent attention; None where attention is not."""
    if not a.multi_latent_attention:
        return None
    queries = "" if a.q_lora_rank is None else f", {a.q_lora_rank} for queries"
    return (
        f"{a.kv_lora_rank} for keys and values{queries}; heads of {a.qk_head_dim} and "
        f"{a.qk_pos_emb_head_dim} rotated, values of {a.v_head_dim}"
    )


def active_text(a: Architecture) -> str | None:
    """Parameters that take part in predicting one token; None where all do."""
    if a.num_experts is None:
        return None
    return f"{num_active_parameters(a):,}"


def _positions(a: Architecture) -> str:
    length = f"{a.max_position_embeddings:,}"
    if a.position_embedding_type != "rope":
        buckets, most = a.relative_attention_num_buckets, a.relative_attention_max_distance
        others = {
            "none": "none",
            "alibi": f"ALiBi, trained on {length}",
            "relative": f"relative, {buckets} buckets up to {most} tokens, trained on {length}",
        }
        return others.get(a.position_embedding_type, f"learned, {length}")
    facts = [f"rotary, {length}", f"base {a.rotary_base:g}"]
    if a.rotary_percent != 1:
        facts.append(f"{a.rotary_percent:.0%} of each head")
    if a.rotary_interleaved:
        facts.append("interleaved")
    if a.rope_type == "yarn":
        length = f"{a.original_max_position_embeddings:,}"
        facts.append(f"YaRN by {a.rotary_scaling_factor:g} from {length}")
    if a.rope_scaling_factor is not None:
        facts.append(f"Llama 3 scaling by {a.rope_scaling_factor:g}")
    if a.rotary_seq_len_interpolation_factor is not None:
        facts.append(f"linear scaling by {a.rotary_seq_len_interpolation_factor:g}")
    return ", ".join(facts)


def _window(a: Architecture) -> str | None:
    count = sum(a.windowed_layers)
    return f"{a.window_size[0] + 1:,} tokens in {count} layers" if a.window_size and count else None


def _origin_rows(checkpoint: Checkpoint) -> Rows:
    converted = ("Converted by", f"mtt {__version__}")
    if checkpoint.config:
        return [("Source", f"a {checkpoint.dialect} folder of Hugging Face"), converted]
    iteration = checkpoint.iteration
    return [
        ("Source", f"a Megatron checkpoint, format {checkpoint.format}"),
        ("Parameter names", checkpoint.dialect),
        ("Layout", f"{checkpoint.layout}, {checkpoint.num_files} files"),
        ("Iteration", "release" if iteration is None else f"{iteration:,}"),
        ("Tokens seen", _tokens_seen(checkpoint)),
        ("Trained in", checkpoint.architecture.params_dtype),
        converted,
    ]


def _tokens_seen(checkpoint: Checkpoint) -> str | None:
    """`consumed_train_samples` times `seq_length`; None where the arguments do not say both.

    Sequences that grew while training (`--seq-length` warmup of DeepSpeed) are counted in full.
    """
    samples = checkpoint.args.get("consumed_train_samples")
    length = checkpoint.args.get("seq_length")
    if type(samples) is not int or type(length) is not int or samples < 1 or length < 1:
        return None
    return f"{samples * length:,} ({samples:,} sequences of {length:,})"


_CODE_NOTE = """
With `pip install modeling-mtt` and `import modeling_mtt`, `trust_remote_code` is not needed.
"""


def _python(family: Family, tokenizer: Tokenizer) -> str:
    trust = ", trust_remote_code=True" if family.code else ""
    auto = family.auto_class
    if not tokenizer.files:
        return f"""\
from transformers import {auto}

path = "FOLDER"
model = {auto}.from_pretrained(path, device_map="auto"{trust})"""
    prompt = "Once upon a <extra_id_0>." if family.kind == "t5" else "Once upon a time"
    return f"""\
from transformers import {auto}, AutoTokenizer

path = "FOLDER"
model = {auto}.from_pretrained(path, device_map="auto"{trust})
tokenizer = AutoTokenizer.from_pretrained(path{trust})
inputs = tokenizer("{prompt}", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))"""


def _several(a: Architecture, family: Family) -> str:
    """Commands for several GPUs, with a size that divides the model; nothing where none does."""
    tp = max(tensor_parallel_sizes(a, _MOST_GPUS))
    if tp == 1:
        return ""
    plugin = " (`pip install modeling-mtt` beside vLLM)" if family.code else ""
    # vLLM runs no encoder-decoder of transformers.
    serve = f"$ vllm serve FOLDER --tensor-parallel-size {tp}\n" if family.kind == "gpt" else ""
    both = f"With vLLM{plugin}, and with mtt:" if serve else "With mtt:"
    return f"""\
On several GPUs, {tp} for example, started by `torchrun --nproc-per-node {tp} script.py`:

```python
{"import modeling_mtt" if family.code else "# script.py"}
from transformers import {family.auto_class}
from transformers.distributed import DistributedConfig

config = DistributedConfig(tp_size={tp})
model = {family.auto_class}.from_pretrained("FOLDER", distributed_config=config)
```

{both}

```console
{serve}$ mtt generate FOLDER --tp {tp} --prompt "Once upon a time"
```
"""

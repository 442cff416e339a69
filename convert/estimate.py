"""Which layouts of a model fit on how many GPUs: bytes and a floor of the time, by arithmetic.

    weights       exact: what each process holds of `mtt generate --tp N --pp N`
    KV cache      exact: keys and values of all tokens, in the layers a process holds
    activations   the largest moment of reading a prompt: an estimate, within a factor of 1.6 of
                  what was measured
    seconds       a token needs at least the time in which the memory of the GPUs that compute it
                  is read once, one pipeline stage after another

No weight is read and no tensor made. How a model can be divided is `layouts.plan_stages`' to say,
and what is divided `parameters.PARAMETERS`'.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .architecture import Architecture
from .checkpoint import Layout
from .dtypes import DTYPES
from .errors import LayoutError
from .layouts import Stage, plan_stages
from .parameters import PARAMETERS, VOCABULARY, Parameter

USABLE = 0.9
"""Part of a GPU's memory that can be filled; the rest is for CUDA, NCCL and fragmentation."""

_QKV = "self_attention.linear_qkv"
_EH_PROJ = ".eh_proj.weight"  # Megatron divides it, transformers does not
_FLOAT32 = 4
_DISTANCE = 12  # of two tokens: as a whole number and in float32


@dataclass(frozen=True, slots=True)
class Model:
    """What the arithmetic needs to know.

    Attributes:
        architecture: the model.
        dtype: name of the element type of weights, KV cache and activations.
    """

    architecture: Architecture
    dtype: str

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return DTYPES[self.dtype].itemsize

    @property
    def num_parameters(self) -> int:
        """Parameters, a tied head counted once."""
        return num_local_parameters(self, Layout(), plan_stages(self.architecture, Layout())[0])


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU."""

    weights: int
    kv_cache: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv_cache + self.activations


@dataclass(frozen=True, slots=True)
class Placement:
    """A layout, and what it takes.

    Attributes:
        layout: TP, PP and EP.
        memory: of the GPU that holds the most.
        fits: whether that is within what a GPU can hold.
        seconds_per_token: the floor; batches share it.
    """

    layout: Layout
    memory: Memory
    fits: bool
    seconds_per_token: float

    @property
    def num_gpus(self) -> int:
        """GPUs of one replica."""
        return self.layout.tp * self.layout.pp


def placements(
    model: Model,
    *,
    num_gpus: int,
    gpu_memory: int,
    gpu_bandwidth: int,
    sequence_length: int,
    batch_size: int,
) -> tuple[Placement, ...]:
    """Every layout whose replicas share the GPUs without rest, the best first.

    The best is the one that fits with the lowest floor, of equals the one with fewer stages.

    Args:
        model: what shall run.
        num_gpus: how many there are.
        gpu_memory: bytes of one.
        gpu_bandwidth: bytes a second that one can read.
        sequence_length: tokens of a prompt and its answer.
        batch_size: prompts at once.
    """
    found = []
    for layout, stages in _layouts(model.architecture, num_gpus):
        memories = [
            Memory(
                weights=num_local_parameters(model, layout, stage) * model.itemsize,
                kv_cache=kv_cache_bytes(model, layout, stage, sequence_length, batch_size),
                activations=activation_bytes(model, layout, stage, sequence_length, batch_size),
            )
            for stage in stages
        ]
        largest = max(memories, key=lambda memory: memory.total)
        read = sum(
            bytes_read_per_token(model, layout, stage, sequence_length, batch_size)
            for stage in stages
        )
        found.append(
            Placement(layout, largest, largest.total <= gpu_memory * USABLE, read / gpu_bandwidth)
        )
    return tuple(
        sorted(found, key=lambda p: (not p.fits, p.seconds_per_token, p.layout.pp, -p.layout.tp))
    )


def _layouts(a: Architecture, num_gpus: int) -> Iterator[tuple[Layout, tuple[Stage, ...]]]:
    """The layouts this model can have, with their stages; `plan_stages` refuses the others."""
    divisors = [size for size in range(1, num_gpus + 1) if num_gpus % size == 0]
    for tp in divisors:
        for pp in divisors:
            if num_gpus % (tp * pp) or pp > a.num_layers:
                continue
            layout = Layout(tp, pp)
            try:
                yield layout, plan_stages(a, layout)
            except LayoutError:
                continue


def num_local_parameters(
    model: Model, layout: Layout, stage: Stage, num_experts: int | None = None
) -> int:
    """Parameters that one process of a stage holds; of uneven parts the larger.

    Embedding and head are divided by their rows; a tied head needs the embedding on the last stage
    too, as do layers that predict further tokens. The table of learned positions is on every
    process of every stage.

    Args:
        model: what is divided.
        layout: tensor- and pipeline-parallel sizes.
        stage: which stage.
        num_experts: experts of a layer to count, all unless told.
    """
    a = model.architecture
    count = a.num_experts or 0 if num_experts is None else num_experts
    shares_table = not a.untie_embeddings_and_output_weights or a.mtp_num_layers > 0
    total = 0
    for parameter in PARAMETERS:
        if not parameter.when(a):
            continue
        size = _local_size(parameter, a, layout.tp) * (count if parameter.of_expert else 1)
        if parameter.name.startswith("decoder.layers."):
            layers = sum(parameter.layers(a, layer) for layer in stage.layers)
            if stage.last:
                layers += a.mtp_num_layers * parameter.layers(a, a.num_layers - 1)
            total += size * layers
        elif parameter.name.startswith("mtp."):
            total += size * a.mtp_num_layers if stage.last else 0
        elif parameter.name == "embedding.word_embeddings.weight":
            total += size if stage.first or (stage.last and shares_table) else 0
        elif parameter.name.startswith("embedding.") or stage.last:
            total += size
    return total


def _local_size(parameter: Parameter, a: Architecture, tp: int) -> int:
    """Elements of a parameter on one tensor-parallel process."""
    shape = parameter.shape(a)
    if (
        not math.prod(shape)
        or parameter.split is None
        or parameter.may_be_whole
        or parameter.name.endswith(_EH_PROJ)
    ):
        return math.prod(shape)
    rows = shape[parameter.split]
    rest = math.prod(shape) // rows
    if _QKV in parameter.name:
        return (a.num_attention_heads // tp + 2 * _local_groups(a, tp)) * a.kv_channels * rest
    return (-(-rows // tp) if parameter.name in VOCABULARY else rows // tp) * rest


def _local_groups(a: Architecture, tp: int) -> int:
    """Key/value heads of one process: where there are more processes than heads, each has one."""
    return max(1, a.num_query_groups // tp)


def kv_cache_bytes(
    model: Model, layout: Layout, stage: Stage, sequence_length: int, batch_size: int
) -> int:
    """Keys and values of a stage's layers; a layer with a window keeps no more than it sees.

    With latent attention, what they are made of.
    """
    a = model.architecture
    lengths = [
        min(sequence_length, a.window_size[0])
        if a.window_size is not None and a.windowed_layers[layer]
        else sequence_length
        for layer in stage.layers
    ]
    per_token = _cached_channels(a, layout.tp) * model.itemsize
    return per_token * batch_size * sum(lengths)


def _cached_channels(a: Architecture, tp: int) -> int:
    """What the cache keeps of a token in a layer; latents are whole on every process."""
    if a.multi_latent_attention:
        return a.kv_lora_rank + a.qk_pos_emb_head_dim
    return 2 * _local_groups(a, tp) * a.kv_channels


def activation_bytes(
    model: Model, layout: Layout, stage: Stage, sequence_length: int, batch_size: int
) -> int:
    """What lives at once when a prompt as long as the sequence is read.

    The largest of three moments, as `MTTDecoderLayer` and `generate` have them: attention, whose
    scores are never whole (sdpa or FlashAttention); the MLP; the logits of the last token, which
    `generate` keeps in float32 beside their own type. Then the cache of one layer, which is copied
    to grow, and of layers with a window what they keep until the next token. With ALiBi, attention
    has the bias of each head for each pair of tokens, and with several prompts once more for each.
    """
    a, tp, itemsize = model.architecture, layout.tp, model.itemsize
    tokens = sequence_length * batch_size
    cast = itemsize if itemsize < _FLOAT32 else 0
    attention = _attention_channels(a, tp) * tokens * itemsize
    if a.position_embedding_type == "alibi":
        pairs = a.num_attention_heads // tp * sequence_length**2
        copies = batch_size if batch_size > 1 else 0
        attention += pairs * (_FLOAT32 + cast + copies * itemsize)
        attention += sequence_length**2 * _DISTANCE
    mlp = _mlp_channels(a, tp) * tokens * itemsize
    if a.num_experts is not None:
        # Their weights are numbers in float32, and so is what is multiplied by them.
        mlp += a.moe_router_topk * a.hidden_size * tokens * (_FLOAT32 if cast else 0)
    # What tensor-parallel processes add up is held more than once.
    streams = 4 if tp == 1 else 7
    layer = streams * a.hidden_size * tokens * itemsize + max(attention, mlp)
    rows = a.vocab_size or a.padded_vocab_size
    logits = batch_size * rows * (2 * _FLOAT32 + cast)
    whole = _cached_channels(a, tp) * tokens * itemsize
    kept = kv_cache_bytes(model, layout, stage, sequence_length, batch_size)
    return max(layer, logits) + whole + whole * len(stage.layers) - kept


def _attention_channels(a: Architecture, tp: int) -> int:
    """Numbers per token that live at once in attention."""
    count = a.num_attention_heads // tp
    heads = count * a.kv_channels
    if a.multi_latent_attention:
        # Queries and keys before and after their parts are put together, values and what they were
        # made with, and padded to the size of keys; the latents.
        values = count * (a.qk_head_dim + a.v_head_dim)
        return 5 * heads + values + (a.q_lora_rank or 0) + 2 * _cached_channels(a, tp)
    groups = _local_groups(a, tp) * a.kv_channels
    channels = 2 * heads + 4 * groups
    if a.position_embedding_type == "rope":
        channels += 2 * heads + 2 * groups + 2 * a.kv_channels
    return channels


def _mlp_channels(a: Architecture, tp: int) -> int:
    """Numbers per token that live at once in an MLP, or in the experts that a token goes to."""
    kinds = 3 if a.gated_linear_unit else 2
    dense = a.ffn_hidden_size // tp * kinds if not all(a.moe_layers) else 0
    if a.num_experts is None:
        return dense
    # A row for each expert of a token, going in and coming out.
    rows = a.moe_router_topk * (a.moe_ffn_hidden_size // tp * kinds + 2 * a.hidden_size)
    return max(dense, rows)


def bytes_read_per_token(
    model: Model, layout: Layout, stage: Stage, sequence_length: int, batch_size: int
) -> int:
    """What one process of a stage must read from memory to make one token of each prompt.

    All weights but the rows of the tables that are looked up, and the whole KV cache. Of experts,
    as many as one prompt's token goes to: several may go to the same. Layers that predict further
    tokens are not needed.
    """
    model = replace(model, architecture=replace(model.architecture, mtp_num_layers=0))
    a = model.architecture
    weights = num_local_parameters(model, layout, stage, a.moe_router_topk if a.num_experts else 0)
    if a.has_position_table:
        weights -= a.max_position_embeddings * a.hidden_size
    tied = not a.untie_embeddings_and_output_weights
    if stage.first and not (tied and stage.last):
        weights -= -(-a.padded_vocab_size // layout.tp) * a.hidden_size
    cache = kv_cache_bytes(model, layout, stage, sequence_length, batch_size)
    return weights * model.itemsize + cache

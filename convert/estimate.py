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
from dataclasses import dataclass

from .architecture import Architecture
from .checkpoint import Layout
from .dtypes import DTYPES
from .errors import LayoutError
from .layouts import Stage, plan_stages
from .parameters import PARAMETERS, VOCABULARY, Parameter

USABLE = 0.9
"""Part of a GPU's memory that can be filled; the rest is for CUDA, NCCL and fragmentation."""

_QKV = "self_attention.linear_qkv"
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


def num_local_parameters(model: Model, layout: Layout, stage: Stage) -> int:
    """Parameters that one process of a stage holds; of uneven parts the larger.

    Embedding and head are divided by their rows; a tied head needs the embedding on the last stage
    too. The table of learned positions is on every process of every stage.
    """
    a = model.architecture
    present = {parameter for parameter in PARAMETERS if parameter.when(a)}
    tied = not a.untie_embeddings_and_output_weights
    total = 0
    for parameter in present:
        size = _local_size(parameter, a, layout.tp)
        if "{i}" in parameter.name:
            total += size * len(stage.layers)
        elif parameter.name == "embedding.word_embeddings.weight":
            total += size if stage.first or (stage.last and tied) else 0
        elif parameter.name.startswith("embedding.") or stage.last:
            total += size
    return total


def _local_size(parameter: Parameter, a: Architecture, tp: int) -> int:
    """Elements of a parameter on one tensor-parallel process."""
    shape = parameter.shape(a)
    if parameter.split is None:
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
    """Keys and values of a stage's layers; a layer with a window keeps no more than it sees."""
    a = model.architecture
    lengths = [
        min(sequence_length, a.window_size[0])
        if a.window_size is not None and a.windowed_layers[layer]
        else sequence_length
        for layer in stage.layers
    ]
    per_token = 2 * _local_groups(a, layout.tp) * a.kv_channels * model.itemsize
    return per_token * batch_size * sum(lengths)


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
    heads = a.num_attention_heads // tp * a.kv_channels
    groups = _local_groups(a, tp) * a.kv_channels
    channels = 2 * heads + 4 * groups
    if a.position_embedding_type == "rope":
        channels += 2 * heads + 2 * groups + 2 * a.kv_channels
    attention = channels * tokens * itemsize
    if a.position_embedding_type == "alibi":
        pairs = a.num_attention_heads // tp * sequence_length**2
        copies = batch_size if batch_size > 1 else 0
        attention += pairs * (_FLOAT32 + cast + copies * itemsize)
        attention += sequence_length**2 * _DISTANCE
    mlp = a.ffn_hidden_size // tp * (3 if a.gated_linear_unit else 2) * tokens * itemsize
    # What tensor-parallel processes add up is held more than once.
    streams = 4 if tp == 1 else 7
    layer = streams * a.hidden_size * tokens * itemsize + max(attention, mlp)
    rows = a.vocab_size or a.padded_vocab_size
    logits = batch_size * rows * (2 * _FLOAT32 + cast)
    whole = 2 * groups * tokens * itemsize
    kept = kv_cache_bytes(model, layout, stage, sequence_length, batch_size)
    return max(layer, logits) + whole + whole * len(stage.layers) - kept


def bytes_read_per_token(
    model: Model, layout: Layout, stage: Stage, sequence_length: int, batch_size: int
) -> int:
    """What one process of a stage must read from memory to make one token of each prompt.

    All weights but the rows of the tables that are looked up, and the whole KV cache.
    """
    a = model.architecture
    weights = num_local_parameters(model, layout, stage)
    if a.has_position_table:
        weights -= a.max_position_embeddings * a.hidden_size
    tied = not a.untie_embeddings_and_output_weights
    if stage.first and not (tied and stage.last):
        weights -= -(-a.padded_vocab_size // layout.tp) * a.hidden_size
    cache = kv_cache_bytes(model, layout, stage, sequence_length, batch_size)
    return weights * model.itemsize + cache

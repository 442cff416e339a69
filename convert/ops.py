"""What happens between two names: exact re-layouts, each with its inverse.

Ops rearrange metadata only. Shapes are written as in Megatron-Core's QKV code
(megatron/core/transformer/attention.py): g query groups, r query heads per group, d channels.

    linear_qkv rows      [g, (r queries, 1 key, 1 value), d]
    linear_kv rows       [g, (1 key, 1 value), d]
    q_proj, k_proj rows  [g * r * d], [g * d]
    linear_fc1 rows      [gate | up], each ffn rows, when the MLP is gated
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from .architecture import Architecture
from .tensors import LazyTensor, concat, zeros

Tensors = tuple[LazyTensor, ...]


class Op(Protocol):
    """A re-layout of a group of tensors."""

    @property
    def inverse(self) -> Op:
        """The op that undoes this one."""

    def apply(self, tensors: Tensors, architecture: Architecture) -> Tensors:
        """The rearranged tensors."""


@dataclass(frozen=True)
class Same:
    """A rename."""

    @property
    def inverse(self) -> Op:
        """Itself."""
        return self

    def apply(self, tensors: Tensors, architecture: Architecture) -> Tensors:
        """The tensors as they are."""
        return tensors


@dataclass(frozen=True)
class SplitQKV:
    """`linear_qkv` in query-group order -> q, k, v (weight or bias)."""

    @property
    def inverse(self) -> Op:
        """Interleave again."""
        return MergeQKV()

    def apply(self, tensors: Tensors, architecture: Architecture) -> Tensors:
        """One tensor [g * (r + 2) * d, ...] -> [g * r * d, ...], [g * d, ...], [g * d, ...]."""
        groups, per_group, channels = _qkv(architecture)
        rows = tensors[0].unflatten(0, groups, per_group + 2, channels)
        return (
            rows.narrow(1, 0, per_group).flatten(0, 3),
            rows.narrow(1, per_group, 1).flatten(0, 3),
            rows.narrow(1, per_group + 1, 1).flatten(0, 3),
        )


@dataclass(frozen=True)
class MergeQKV:
    """q, k, v -> `linear_qkv` in query-group order."""

    @property
    def inverse(self) -> Op:
        """Take apart again."""
        return SplitQKV()

    def apply(self, tensors: Tensors, architecture: Architecture) -> Tensors:
        """The three tensors of `SplitQKV` -> one."""
        groups, per_group, channels = _qkv(architecture)
        heads = (per_group, 1, 1)
        parts = [t.unflatten(0, groups, n, channels) for t, n in zip(tensors, heads, strict=True)]
        return (concat(parts, axis=1).flatten(0, 3),)


@dataclass(frozen=True)
class SplitKV:
    """`linear_kv` of cross attention, a key and a value after another -> k, v (weight or bias).

    (Source: CrossAttention.get_query_key_value_tensors, transformer/attention.py.)
    """

    @property
    def inverse(self) -> Op:
        """Interleave again."""
        return MergeKV()

    def apply(self, tensors: Tensors, architecture: Architecture) -> Tensors:
        """One tensor [g * 2 * d, ...] -> [g * d, ...], [g * d, ...]."""
        groups, _, channels = _qkv(architecture)
        rows = tensors[0].unflatten(0, groups, 2, channels)
        return (rows.narrow(1, 0, 1).flatten(0, 3), rows.narrow(1, 1, 1).flatten(0, 3))


@dataclass(frozen=True)
class MergeKV:
    """k, v -> `linear_kv`."""

    @property
    def inverse(self) -> Op:
        """Take apart again."""
        return SplitKV()

    def apply(self, tensors: Tensors, architecture: Architecture) -> Tensors:
        """The two tensors of `SplitKV` -> one."""
        groups, _, channels = _qkv(architecture)
        parts = [tensor.unflatten(0, groups, 1, channels) for tensor in tensors]
        return (concat(parts, axis=1).flatten(0, 3),)


@dataclass(frozen=True)
class ConcatQKV:
    """q, k, v -> one matrix with all queries first, as in GPT-2's `c_attn` before transposing."""

    @property
    def inverse(self) -> Op:
        """Take apart again."""
        return ChunkQKV()

    def apply(self, tensors: Tensors, architecture: Architecture) -> Tensors:
        """[g * r * d, ...], [g * d, ...], [g * d, ...] -> [g * (r + 2) * d, ...]."""
        return (concat(tensors),)


@dataclass(frozen=True)
class ChunkQKV:
    """One matrix with all queries first -> q, k, v."""

    @property
    def inverse(self) -> Op:
        """Join again."""
        return ConcatQKV()

    def apply(self, tensors: Tensors, architecture: Architecture) -> Tensors:
        """One tensor [g * (r + 2) * d, ...] -> [g * r * d, ...], [g * d, ...], [g * d, ...]."""
        groups, per_group, channels = _qkv(architecture)
        parts, start = [], 0
        for heads in (groups * per_group, groups, groups):
            parts.append(tensors[0].narrow(0, start, heads * channels))
            start += heads * channels
        return tuple(parts)


@dataclass(frozen=True)
class Transpose:
    """[out, in] -> [in, out], as transformers' `Conv1D` stores matrices."""

    @property
    def inverse(self) -> Op:
        """Itself."""
        return self

    def apply(self, tensors: Tensors, architecture: Architecture) -> Tensors:
        """Matrices with their axes exchanged."""
        return tuple(tensor.permute(1, 0) for tensor in tensors)


@dataclass(frozen=True)
class Chain:
    """Ops one after the other."""

    ops: tuple[Op, ...]

    @property
    def inverse(self) -> Op:
        """Their inverses in the opposite order."""
        return Chain(tuple(op.inverse for op in reversed(self.ops)))

    def apply(self, tensors: Tensors, architecture: Architecture) -> Tensors:
        """The tensors of the last one."""
        for op in self.ops:
            tensors = op.apply(tensors, architecture)
        return tensors


@dataclass(frozen=True)
class SplitGated:
    """`linear_fc1` of a gated MLP -> gate, up."""

    @property
    def inverse(self) -> Op:
        """Join again."""
        return MergeGated()

    def apply(self, tensors: Tensors, architecture: Architecture) -> Tensors:
        """[2 * ffn, ...] -> [ffn, ...] (the activated half), [ffn, ...]."""
        return tensors[0].chunk(2)


@dataclass(frozen=True)
class MergeGated:
    """gate, up -> `linear_fc1` of a gated MLP."""

    @property
    def inverse(self) -> Op:
        """Split again."""
        return SplitGated()

    def apply(self, tensors: Tensors, architecture: Architecture) -> Tensors:
        """[ffn, ...], [ffn, ...] -> [2 * ffn, ...]."""
        return (concat(tensors),)


@dataclass(frozen=True)
class JoinKeyValue:
    """Megatron-DeepSpeed's `query` and `key_value` -> their rows one after another."""

    @property
    def inverse(self) -> Op:
        """Take apart again."""
        return PartKeyValue()

    def apply(self, tensors: Tensors, architecture: Architecture) -> Tensors:
        """[g * r * d, ...], [g * 2 * d, ...] -> [g * (r + 2) * d, ...]; a rank's part alike."""
        return (concat(tensors),)


@dataclass(frozen=True)
class PartKeyValue:
    """Rows of queries, then of keys and values -> two tensors."""

    @property
    def inverse(self) -> Op:
        """Join again."""
        return JoinKeyValue()

    def apply(self, tensors: Tensors, architecture: Architecture) -> Tensors:
        """[g * (r + 2) * d, ...] -> [g * r * d, ...], [g * 2 * d, ...]."""
        groups, per_group, channels = _qkv(architecture)
        size = groups * per_group * channels
        return (tensors[0].narrow(0, 0, size), tensors[0].narrow(0, size, 2 * groups * channels))


@dataclass(frozen=True)
class TrimVocab:
    """Drop the rows that only pad the vocabulary, where the true size is known."""

    @property
    def inverse(self) -> Op:
        """Add rows of zeros."""
        return PadVocab()

    def apply(self, tensors: Tensors, architecture: Architecture) -> Tensors:
        """[padded_vocab_size, ...] -> [vocab_size, ...]."""
        size = architecture.vocab_size or architecture.padded_vocab_size
        return (tensors[0].narrow(0, 0, size),)


@dataclass(frozen=True)
class AddTokenTypes:
    """Word embeddings of a BERT without token types -> those, and a table of one type of zeros."""

    @property
    def inverse(self) -> Op:
        """Drop the second table."""
        return DropTokenTypes()

    def apply(self, tensors: Tensors, architecture: Architecture) -> Tensors:
        """[padded_vocab_size, h] -> [vocab_size, h], [1, h]."""
        (words,) = TrimVocab().apply(tensors, architecture)
        return (words, zeros(words.dtype, (1, *words.shape[1:])))


@dataclass(frozen=True)
class DropTokenTypes:
    """Word embeddings and a table of token types -> the former alone."""

    @property
    def inverse(self) -> Op:
        """Add a table of zeros."""
        return AddTokenTypes()

    def apply(self, tensors: Tensors, architecture: Architecture) -> Tensors:
        """[vocab_size, h], [1, h] -> [padded_vocab_size, h]."""
        return PadVocab().apply(tensors[:1], architecture)


@dataclass(frozen=True)
class PadVocab:
    """Rows of zeros up to the padded vocabulary size."""

    @property
    def inverse(self) -> Op:
        """Drop them."""
        return TrimVocab()

    def apply(self, tensors: Tensors, architecture: Architecture) -> Tensors:
        """[vocab_size, ...] -> [padded_vocab_size, ...]."""
        (tensor,) = tensors
        return (resize_rows(tensor, tensor.shape[0], architecture.padded_vocab_size),)


def _qkv(architecture: Architecture) -> tuple[int, int, int]:
    return architecture.num_query_groups, architecture.heads_per_group, architecture.kv_channels


def resize_rows(tensor: LazyTensor, num_kept: int, num_rows: int) -> LazyTensor:
    """The first `num_kept` rows of a tensor, and rows of zeros up to `num_rows`."""
    kept = tensor.narrow(0, 0, num_kept)
    if num_rows == num_kept:
        return kept
    return concat([kept, zeros(tensor.dtype, (num_rows - num_kept, *tensor.shape[1:]))])

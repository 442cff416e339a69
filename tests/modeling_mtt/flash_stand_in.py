"""FlashAttention's functions, in plain PyTorch on a CPU, strict about how they are called.

Signatures are those of flash-attn 2.8 (flash_attn_interface.py), of FlashAttention-3's
hopper/flash_attn_interface.py, of FlashAttention-4's flash_attn/cute/interface.py, and of
torch.nn.attention.varlen, without the arguments that nobody passes here.
"""

from __future__ import annotations

import torch

HALF = (torch.float16, torch.bfloat16)


def _check(query, key, value, ndim):
    for states in (query, key, value):
        assert states.ndim == ndim, states.shape
        assert states.dtype in HALF and states.dtype == query.dtype
        assert states.stride(-1) == 1
        assert states.device == query.device
    assert key.shape == value.shape
    assert query.shape[-1] == key.shape[-1] <= 256
    assert query.shape[-2] % key.shape[-2] == 0


def _attend(query, key, value, scale, window, causal):
    """One sequence `[tokens, heads, head_dim]`; if causal, the last query is at the last key."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = (t.float().transpose(0, 1) for t in (query, key, value))
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    at_query = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    distance = at_query - torch.arange(k.shape[1])
    assert causal or window < 0
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window >= 0:
        seen &= distance <= window
    scores = (q @ k.transpose(1, 2)) * scale
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights @ v).transpose(0, 1).to(query.dtype)


def _dense(query, key, value, scale, window, causal):
    _check(query, key, value, 4)
    rows = zip(query, key, value, strict=True)
    return torch.stack([_attend(*row, scale, window, causal) for row in rows])


def _packed(query, key, value, cu_q, cu_k, max_q, max_k, scale, window, causal):
    _check(query, key, value, 3)
    for cu, states, longest in ((cu_q, query, max_q), (cu_k, key, max_k)):
        assert cu.dtype == torch.int32 and cu.ndim == 1 and cu.is_contiguous()
        assert cu[0] == 0 and cu[-1] == len(states), (cu, len(states))
        assert int(longest) == int(cu.diff().max())
    assert len(cu_q) == len(cu_k)
    output = torch.empty_like(query)
    for i in range(len(cu_q) - 1):
        q, k = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        output[q] = _attend(query[q], key[k], value[k], scale, window, causal)
    return output


def _left(window_size):
    left = window_size[0]
    return -1 if left is None else left


class Flash2:
    """flash-attn 2: outputs only, takes dropout."""

    calls: list[str]

    def __init__(self):
        self.calls = []

    def flash_attn_func(
        self,
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
    ):
        assert dropout_p == 0.0 and alibi_slopes is None
        self.calls.append("dense")
        return _dense(q, k, v, softmax_scale, _left(window_size), causal)

    def flash_attn_varlen_func(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        block_table=None,
    ):
        assert dropout_p == 0.0 and alibi_slopes is None and block_table is None
        self.calls.append("packed")
        return _packed(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            softmax_scale,
            _left(window_size),
            causal,
        )


class Flash3(Flash2):
    """FlashAttention-3: no dropout."""

    def flash_attn_func(
        self, q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False
    ):
        return super().flash_attn_func(q, k, v, 0.0, softmax_scale, causal, window_size)

    def flash_attn_varlen_func(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        deterministic=False,
    ):
        return super().flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            0.0,
            softmax_scale,
            causal,
            window_size,
        )


class Flash4(Flash3):
    """FlashAttention-4: None for no window, outputs with their log-sum-exp."""

    def flash_attn_func(
        self,
        q,
        k,
        v,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        deterministic=False,
    ):
        output = super().flash_attn_func(q, k, v, softmax_scale, causal, window_size)
        return output, None

    def flash_attn_varlen_func(
        self,
        q,
        k,
        v,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        deterministic=False,
    ):
        output = super().flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            softmax_scale,
            causal,
            window_size,
        )
        return output, None


class TorchVarlen:
    """`torch.nn.attention.varlen.varlen_attn` of torch 2.12 and newer."""

    calls: list[str]

    def __init__(self):
        self.calls = []

    def varlen_attn(
        self,
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        scale=None,
        window_size=(-1, -1),
        enable_gqa=False,
    ):
        assert enable_gqa or query.shape[1] == key.shape[1]
        assert isinstance(max_q, int) and isinstance(max_k, int)
        assert window_size[1] in (0, -1), "causal, or everything"
        self.calls.append("packed")
        causal = window_size[1] == 0
        return _packed(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size[0], causal
        )


class OldTorchVarlen(TorchVarlen):
    """`varlen_attn` of torch 2.10: causal or not, as many heads on both sides."""

    def varlen_attn(
        self,
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        is_causal=False,
        return_aux=None,
        scale=None,
    ):
        window = (-1, 0 if is_causal else -1)
        return super().varlen_attn(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window
        )

"""Attention functions that transformers does not have: eager with a bias, and torch's varlen."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    flash_attention_mask,
)
from transformers.modeling_flash_attention_utils import (
    _is_packed_sequence,
    _pad_input,
    _unpad_input,
    _upad_input,
    prepare_fa_kwargs_from_position_ids,
)
from transformers.modeling_utils import AttentionInterface
from transformers.processing_utils import Unpack
from transformers.utils import (
    TransformersKwargs,
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_flash_attn_4_available,
    is_kernels_available,
    logging,
)

logger = logging.get_logger(__name__)

TORCH_VARLEN = "torch_varlen"
FLASH_ATTENTION = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
# The others have no argument for a bias, and some would ignore it.
BIASED_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")


def available_implementation(requested: str | None) -> str | None:
    """Return `torch_varlen` for a FlashAttention that no installed package has, on a GPU."""
    if requested not in FLASH_ATTENTION or not torch.cuda.is_available():
        return requested
    if (
        is_flash_attn_2_available()
        or is_flash_attn_3_available()
        or is_flash_attn_4_available()
        or is_kernels_available()
    ):
        return requested
    logger.warning_once(
        f"No FlashAttention package is installed: attn_implementation='{requested}' becomes "
        f"'{TORCH_VARLEN}', the one that PyTorch brings."
    )
    return TORCH_VARLEN


def check_bias(implementation: str, who_adds: str) -> None:
    """Raise where an attention implementation would leave a bias out in silence."""
    if implementation not in BIASED_IMPLEMENTATIONS:
        raise ValueError(
            f"{who_adds} a bias to attention scores: found attention implementation "
            f"'{implementation}', expected one of {BIASED_IMPLEMENTATIONS}. "
            'Load the model with attn_implementation="sdpa".'
        )


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention spelt out, for when its weights are asked for.

    Args:
        query (`torch.Tensor`): `[batch, heads, queries, head_dim]`.
        key, value (`torch.Tensor`): `[batch, key_value_heads, keys, head_dim]`.
        attention_mask (`torch.Tensor`, *optional*): `[batch, 1, queries, keys]`, is added.
        position_bias (`torch.Tensor`, *optional*): `[batch or 1, heads, queries, keys]`, is added.

    Returns:
        Output `[batch, queries, heads, head_dim]` and weights `[batch, heads, queries, keys]`.
    """
    group_size = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group_size, dim=1)
    value = value.repeat_interleave(group_size, dim=1)

    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if position_bias is not None:
        # In float32, where the lowest number of a mask can be added to it.
        scores = scores.float() + position_bias
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    output = torch.matmul(weights, value).transpose(1, 2).contiguous()
    return output, weights


def torch_varlen_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """FlashAttention as PyTorch brings it, `torch.nn.attention.varlen.varlen_attn`.

    Sequences lie one behind the other, as `cu_seq_lens` says, so that nothing is computed for
    padding and nothing is seen across packed sequences.

    Args:
        query (`torch.Tensor`): `[batch, heads, queries, head_dim]`, float16 or bfloat16.
        key, value (`torch.Tensor`): `[batch, key_value_heads, keys, head_dim]`.
        attention_mask (`torch.Tensor`, *optional*): 1 where there is a token, `[batch, keys]`.
        sliding_window (`int`, *optional*): how many tokens are seen, the current one included.
        kwargs: `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`, `max_length_k` of packed
            sequences, or the `position_ids` that tell them.

    Returns:
        Output `[batch, queries, heads, head_dim]`, and None.

    Raises:
        `ValueError`: this device, dtype or dropout cannot be served, or this PyTorch no window.
    """
    _check_varlen(query, dropout)
    batch_size, _, num_queries, _ = query.shape
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    position_ids = kwargs.get("position_ids")

    padding = None
    if attention_mask is not None:
        query, key, value, padding, cu_seq_lens, max_lengths = _upad_input(
            query, key, value, attention_mask, num_queries, _unpad_input
        )
    else:
        num_keys = key.shape[1]
        query, key, value = (states.flatten(0, 1) for states in (query, key, value))
        if kwargs.get("cu_seq_lens_q") is not None:
            cu_seq_lens = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
            max_lengths = kwargs["max_length_q"], kwargs["max_length_k"]
        elif num_queries == num_keys and _is_packed_sequence(position_ids, batch_size):
            cu_seq_lens, max_lengths = prepare_fa_kwargs_from_position_ids(position_ids)
        else:
            cu_seq_lens = tuple(
                torch.arange(batch_size + 1, dtype=torch.int32, device=query.device) * length
                for length in (num_queries, num_keys)
            )
            max_lengths = num_queries, num_keys

    # Left of a query, and right of it: -1 is everything.
    window = (-1 if sliding_window is None else sliding_window - 1, 0 if module.is_causal else -1)
    output = _varlen((query, key, value), cu_seq_lens, max_lengths, scaling, window)
    if padding is not None:
        return _pad_input(output, padding, batch_size, num_queries), None
    return output.unflatten(0, (batch_size, num_queries)), None


def _check_varlen(query: torch.Tensor, dropout: float) -> None:
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"FlashAttention computes in half precision: found {query.dtype}, expected "
            "torch.float16 or torch.bfloat16. Load the model with dtype=torch.bfloat16, or use "
            'attn_implementation="sdpa".'
        )
    if dropout:
        raise ValueError(
            f"attn_implementation='{TORCH_VARLEN}' has no dropout: found attention_dropout "
            f"{dropout}, expected 0. Set it to 0, or use 'flash_attention_2' or 'sdpa'."
        )


def _varlen(
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cu_seq_lens: tuple[torch.Tensor, torch.Tensor],
    max_lengths: tuple[int, int],
    scale: float | None,
    window: tuple[int, int],
) -> torch.Tensor:
    """Call the `varlen_attn` of this PyTorch: states `[tokens, heads, head_dim]`."""
    query, key, value = states
    accepted = _parameters_of(varlen_attn)
    options: dict[str, Any] = {"scale": scale}
    if "window_size" in accepted:
        options["window_size"] = window
    elif window[0] == -1:
        options["is_causal"] = window[1] == 0
    else:
        raise ValueError(
            f"The varlen_attn of torch {torch.__version__} has no window_size, and the model has a "
            "sliding window. Update torch, or use attn_implementation='sdpa'."
        )
    if key.shape[1] != query.shape[1]:
        if "enable_gqa" in accepted:
            options["enable_gqa"] = True
        else:
            num_groups = query.shape[1] // key.shape[1]
            key, value = (each.repeat_interleave(num_groups, 1) for each in (key, value))
    try:
        output = varlen_attn(
            query, key, value, *cu_seq_lens, *(int(length) for length in max_lengths), **options
        )
    except NotImplementedError as error:
        raise ValueError(
            f"attn_implementation='{TORCH_VARLEN}' runs on GPUs: found {query.device}, expected "
            'a CUDA device. Move the model there, or use attn_implementation="sdpa".'
        ) from error
    assert isinstance(output, torch.Tensor)
    return output


@cache
def _parameters_of(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def torch_varlen_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """Return which keys hold a token, `[batch, keys]`: those of a static cache may not yet."""
    num_seen = int(q_offset) + q_length - kv_offset
    if mask_function is bidirectional_mask_function:
        num_seen = kv_length
    if num_seen < kv_length:
        if attention_mask is None:
            return torch.ones(batch_size, num_seen, dtype=torch.bool, device=device)
        return attention_mask[:, :num_seen]
    mask: torch.Tensor | None = flash_attention_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask
    )
    return mask


def pack_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Lay the rows of a batch one behind the other, without the padding of their keys.

    For FlashAttention from one text to another, all of whose queries count.

    Args:
        query (`torch.Tensor`): `[batch, heads, queries, head_dim]`.
        key, value (`torch.Tensor`): `[batch, key_value_heads, keys, head_dim]`.
        key_mask (`torch.Tensor`): true where there is a token, `[batch, keys]`.

    Returns:
        Queries `[1, heads, batch * queries, head_dim]`, keys and values `[1, key_value_heads,
        tokens, head_dim]`, and the arguments that say where rows start.
    """
    batch_size, _, num_queries, _ = query.shape
    key_mask = key_mask.bool()
    lengths = key_mask.sum(-1)
    starts = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    arguments = {
        "cu_seq_lens_q": torch.arange(batch_size + 1, device=query.device).int() * num_queries,
        "cu_seq_lens_k": starts,
        "max_length_q": num_queries,
        "max_length_k": int(lengths.max()),
    }
    packed = query.transpose(1, 2).flatten(0, 1)
    keys, values = (states.transpose(1, 2)[key_mask] for states in (key, value))
    query, key, value = (states.transpose(0, 1).unsqueeze(0) for states in (packed, keys, values))
    return query, key, value, arguments


def positions_of_packed(cu_seq_lens: torch.Tensor, length: int) -> torch.Tensor:
    """Return positions `[1, length]` that start anew where a packed sequence does.

    Args:
        cu_seq_lens (`torch.Tensor`): where sequences start, and the last one ends,
            `[sequences + 1]`.
    """
    tokens = torch.arange(length, device=cu_seq_lens.device)
    sequence = torch.searchsorted(cu_seq_lens[1:].contiguous(), tokens, right=True)
    starts = cu_seq_lens[sequence.clamp(max=len(cu_seq_lens) - 1)]
    return (tokens - starts).unsqueeze(0)


AttentionInterface.register(TORCH_VARLEN, torch_varlen_attention_forward)
AttentionMaskInterface.register(TORCH_VARLEN, torch_varlen_mask)

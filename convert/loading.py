"""Megatron shards straight into a model in memory: the same plan, with tensors as its sink."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .documents import generation_config, special_tokens
from .errors import MTTError
from .execute import Progress, check_replicas, run
from .hf_folder import plan_conversion
from .pipeline import open_checkpoint
from .plan import PlannedFile, PlannedTensor
from .reading import FileReader

if TYPE_CHECKING:
    import torch

    from modeling_mtt import MTTForCausalLM


class TensorSink:
    """Collects a plan's tensors as torch tensors on the CPU."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._views: dict[str, memoryview] = {}

    def write(
        self, file: PlannedFile, tensor: PlannedTensor, position: int, data: memoryview
    ) -> None:
        """Bytes of a tensor from `position` bytes after its beginning."""
        if tensor.name not in self._views:
            self._allocate(tensor)
        self._views[tensor.name][position : position + len(data)] = data

    def _allocate(self, tensor: PlannedTensor) -> None:
        import torch

        dtype = getattr(torch, tensor.dtype.name)
        values = torch.empty(tensor.source.shape, dtype=dtype)
        self.tensors[tensor.name] = values
        self._views[tensor.name] = values.view(-1).view(torch.uint8).numpy().data

    def tensor_done(self, file: PlannedFile, tensor: PlannedTensor, digest: str) -> None:
        """The tensor is whole: nothing writes to it any more."""
        if tensor.name not in self.tensors:
            self._allocate(tensor)
        del self._views[tensor.name]

    def file_done(self, file: PlannedFile) -> None:
        """Nothing to do: there is no file."""


def from_megatron(
    path: str | os.PathLike[str],
    *,
    iteration: int | None = None,
    overrides: Mapping[str, object] | None = None,
    skip_keys: Iterable[str] = (),
    dtype: str = "auto",
    vocab_padding: str | None = None,
    tokenizer: str | None = None,
    num_workers: int = 1,
    progress: Progress | None = None,
    **kwargs: Any,
) -> MTTForCausalLM:
    """Load a Megatron checkpoint as a `MTTForCausalLM` without writing a file.

    Args:
        path: see `open_checkpoint`, with `iteration`, `overrides` and `skip_keys`.
        dtype, vocab_padding, tokenizer: see `plan_conversion`.
        num_workers: threads that read.
        progress: called with (bytes done, bytes in all).
        kwargs: fields of `MTTConfig` to replace, or `attn_implementation`.

    Raises:
        SourceError, UsageError: see `open_checkpoint` and `plan_conversion`.
    """
    from accelerate import init_empty_weights
    from transformers import GenerationConfig

    from modeling_mtt import MTTConfig, MTTForCausalLM

    checkpoint = open_checkpoint(
        path, iteration=iteration, overrides=overrides, skip_keys=skip_keys
    )
    conversion = plan_conversion(
        checkpoint, dtype=dtype, vocab_padding=vocab_padding, tokenizer=tokenizer
    )
    with FileReader() as reader:
        check_replicas(conversion.plan.replicas, reader)
    sink = TensorSink()
    run(conversion.plan, sink, num_workers=num_workers, algorithm="none", progress=progress)
    ids = special_tokens(conversion.tokenizer)
    config = MTTConfig(**{**conversion.config, **ids, "dtype": conversion.dtype, **kwargs})
    with init_empty_weights(include_buffers=False):
        model = MTTForCausalLM(config)
    missing, unexpected = model.load_state_dict(sink.tensors, strict=False, assign=True)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        raise MTTError(f"the model and the plan disagree: {sorted(missing)} {unexpected}")
    model.tie_weights()
    model.generation_config = GenerationConfig(**generation_config(conversion.tokenizer))
    model.eval()
    return model

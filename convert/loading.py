"""Megatron shards straight into a model in memory: the same plan, with tensors as its sink."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from . import replicas
from .bert_logits import check_single, model_class
from .conversion import Conversion
from .documents import generation_config
from .dropping import without_mtp
from .errors import MTTError, UsageError
from .execute import Progress, run
from .in_memory import with_experts_together
from .pipeline import open_checkpoint, plan_conversion
from .plan import PlannedFile, PlannedTensor
from .sharding import check_layout, compare_together, local_plan, placed
from .sums import Sums

if TYPE_CHECKING:
    import torch

    from modeling_mtt import MTTForCausalLM, MTTForConditionalGeneration

_LOGGER = logging.getLogger(__name__)


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

    def tensor_done(self, file: PlannedFile, tensor: PlannedTensor, sums: Sums) -> None:
        """The tensor is whole: nothing writes to it any more."""
        if tensor.name not in self.tensors:
            self._allocate(tensor)
        del self._views[tensor.name]

    def file_done(self, file: PlannedFile) -> None:
        """Nothing to do: there is no file."""


def from_megatron(
    path: str | os.PathLike[str],
    *,
    tp_size: int = 1,
    pp_size: int = 1,
    iteration: int | None = None,
    overrides: Mapping[str, object] | None = None,
    skip_keys: Iterable[str] = (),
    dtype: str = "auto",
    vocab_padding: str | None = None,
    tokenizer: str | None = None,
    replicated: str | None = None,
    qkv_order: str = "auto",
    drop_mtp: bool = False,
    num_workers: int = 1,
    progress: Progress | None = None,
    **kwargs: Any,
) -> MTTForCausalLM | MTTForConditionalGeneration:
    """Load a Megatron checkpoint as a `MTTForCausalLM` without writing a file.

    A T5 becomes a `MTTForConditionalGeneration`, a BERT the class of transformers that its
    `config.json` would name.

    With `tp_size` or `pp_size` it is called by every process that torchrun started, reads only
    what its process holds, and gives what `from_pretrained` with a `DistributedConfig` would.

    Args:
        path: see `open_checkpoint`, with `iteration`, `overrides`, `skip_keys` and `qkv_order`.
        tp_size, pp_size: processes that share every layer, and stages that layers are dealt to.
        dtype, vocab_padding, tokenizer: see `plan_conversion`.
        replicated: see `convert`; what it warns of is logged.
        drop_mtp: leave out layers that predict further tokens.
        num_workers: threads that read.
        progress: called with (bytes done, bytes in all).
        kwargs: fields of the configuration to replace, or `attn_implementation`.

    Raises:
        SourceError, UsageError: see `open_checkpoint` and `plan_conversion`.
        LayoutError: the model cannot be cut into such parts.
        TypeError: a keyword is no field of the configuration.
    """
    from accelerate import init_empty_weights
    from transformers import GenerationConfig, MegatronBertConfig
    from transformers.distributed import DistributedConfig

    from modeling_mtt import MTTConfig, MTTSeq2SeqConfig

    _check_keywords(kwargs, MTTConfig, MTTSeq2SeqConfig, MegatronBertConfig)
    if num_workers < 1:
        raise UsageError("no workers", found=str(num_workers), expected="at least 1")
    replicas.check_choice(replicated)
    checkpoint = open_checkpoint(
        path,
        iteration=iteration,
        overrides=overrides,
        skip_keys=skip_keys,
        qkv_order=qkv_order,
    )
    checkpoint = without_mtp(checkpoint) if drop_mtp else checkpoint
    checkpoint, policy = replicas.settle(checkpoint, replicated)
    conversion = plan_conversion(
        checkpoint, dtype=dtype, vocab_padding=vocab_padding, tokenizer=tokenizer
    )
    if conversion.checkpoint.architecture.kind == "bert":
        check_single(tp_size * pp_size)
        for warning in replicas.compare(conversion.plan.replicas, policy):
            _LOGGER.warning(warning)
        bert = _bert(conversion, kwargs, num_workers=num_workers, progress=progress)
        return cast("MTTForCausalLM", bert)
    fields = {**conversion.config, **conversion.tokens, "dtype": conversion.dtype, **kwargs}
    config_class, model_class = _classes(conversion.model_type)
    _check_keywords(kwargs, config_class)
    config = config_class(**fields)
    check_layout(config, tp_size, pp_size)
    distributed = tp_size * pp_size > 1
    layout = DistributedConfig(tp_size=tp_size, pp_size=pp_size) if distributed else None
    _, device, mesh = model_class.prepare_distribute_model(layout)
    compare = compare_together if distributed else replicas.compare
    for warning in compare(conversion.plan.replicas, policy):
        _LOGGER.warning(warning)
    with init_empty_weights(include_buffers=False):
        model = model_class(config)
    plan = with_experts_together(conversion.plan)
    if distributed:
        model = model_class.maybe_distribute_model(model, layout, mesh)
        plan = local_plan(plan, model)
    sink = TensorSink()
    run(plan, sink, num_workers=num_workers, algorithm="none", progress=progress)
    tensors = placed(sink.tensors, model, device) if distributed else sink.tensors
    _fill(model, tensors)
    if distributed:
        model.to(device)  # buffers
    generation = generation_config(conversion.tokens, checkpoint.architecture)
    model.generation_config = GenerationConfig(**generation)
    loaded: MTTForCausalLM | MTTForConditionalGeneration = model.eval()
    return loaded


def _classes(model_type: str) -> tuple[Any, Any]:
    """Configuration and model of one of our families."""
    import modeling_mtt as m

    if model_type == "mtt_seq2seq":
        return m.MTTSeq2SeqConfig, m.MTTForConditionalGeneration
    assert model_type == "mtt", model_type
    return m.MTTConfig, m.MTTForCausalLM


def _check_keywords(kwargs: Mapping[str, object], *classes: Any) -> None:
    """Raise TypeError for a keyword that is no field of any of these configurations."""
    known = {field.name for one in classes for field in dataclasses.fields(one)}
    if unknown := sorted(set(kwargs) - known - {"attn_implementation"}):
        raise TypeError(f"from_megatron() got unexpected keywords: {', '.join(unknown)}")


def _bert(
    conversion: Conversion,
    kwargs: Mapping[str, Any],
    *,
    num_workers: int,
    progress: Progress | None,
) -> Any:
    """A BERT of transformers' own class."""
    from accelerate import init_empty_weights
    from transformers import MegatronBertConfig

    _check_keywords(kwargs, MegatronBertConfig)
    fields = {**conversion.config, **conversion.tokens, "dtype": conversion.dtype, **kwargs}
    config = MegatronBertConfig(**fields)
    with init_empty_weights(include_buffers=False):
        model = model_class(config)(config)
    sink = TensorSink()
    run(conversion.plan, sink, num_workers=num_workers, algorithm="none", progress=progress)
    _fill(model, sink.tensors)
    return model.eval()


def _fill(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give an empty model its weights.

    Raises:
        MTTError: they are not the model's.
    """
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    if unexpected or set(missing) - set(model.all_tied_weights_keys):
        raise MTTError(f"the model and the plan disagree: {sorted(missing)} {unexpected}")
    # A pipeline stage that has no head has nothing to tie.
    model.tie_weights(recompute_mapping=False)

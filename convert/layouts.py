"""A parallel layout to write: which layers a rank holds, and which sizes a model can have.

    stage s = chunk v * pp + rank p     holds a run of layers; stages in order are the layers
    first stage                         also the embeddings
    last stage                          also the final norm and the output layer

Integers only. (Sources: get_num_layers_to_build in core/transformer/transformer_block.py,
PipelineParallelLayerLayout in core/transformer/pipeline_parallel_layer_layout.py and
TransformerConfig.__post_init__, megatron-core 0.16.1.)
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .architecture import Architecture
from .checkpoint import Layout
from .errors import LayoutError
from .t5_arguments import check_stages

_MOST_RANKS = 100_000
_MOST_NAMED = 12


@dataclass(frozen=True, slots=True)
class Stage:
    """What one virtual chunk of one pipeline rank holds."""

    pp: int
    vpp: int
    layers: range
    first: bool
    last: bool


def plan_stages(
    architecture: Architecture, layout: Layout, pipeline_layout: str | None = None
) -> tuple[Stage, ...]:
    """The pipeline stages of a layout, in the order of their layers.

    Args:
        architecture: the model.
        layout: sizes; all but `tp` and `pp` may be 1.
        pipeline_layout: Megatron's `--pipeline-model-parallel-layout`, e.g. `Et*3|t*4|t*4|t*3L`;
            None divides the layers evenly.

    Raises:
        LayoutError: the model cannot be divided like this; sizes that can are named.
    """
    _check_sizes(architecture, layout)
    check_stages(architecture, layout.pp, layout.vpp, pipeline_layout)
    if pipeline_layout is not None:
        counts = _parse(pipeline_layout, architecture, layout.pp)
    else:
        counts = _even(architecture.num_layers, layout)
    starts = [sum(counts[:number]) for number in range(len(counts))]
    return tuple(
        Stage(
            pp=number % layout.pp,
            vpp=number // layout.pp,
            layers=range(start, start + count),
            first=number == 0,
            last=number == len(counts) - 1,
        )
        for number, (start, count) in enumerate(zip(starts, counts, strict=True))
    )


def num_chunks(pipeline_layout: str, pp: int) -> int:
    """Virtual chunks per rank of a custom pipeline layout.

    Raises:
        LayoutError: its stages cannot be dealt to the ranks.
    """
    stages = _unrolled(pipeline_layout).split("|")
    if len(stages) % pp:
        raise LayoutError(
            "the pipeline layout does not fit the pipeline; nothing was written",
            found=f"{len(stages)} stages in {pipeline_layout}, for {pp} ranks",
            expected=f"a multiple of {pp} stages",
            fix="correct --pp or --pipeline-model-parallel-layout",
        )
    return len(stages) // pp


def _check_sizes(a: Architecture, layout: Layout) -> None:
    given = {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "ep": layout.ep}
    for option, size in {**given, "etp": layout.expert_tp}.items():
        if not 1 <= size <= _MOST_RANKS:
            raise LayoutError(f"an impossible --{option}", found=str(size), expected="at least 1")
    _check_experts(a, layout)
    if not _can_be_tensor_parallel(a, layout.tp):
        sizes = _choices(
            lambda tp: _can_be_tensor_parallel(a, tp), a.num_attention_heads, layout.tp
        )
        groups = "" if a.multi_latent_attention else f", {a.num_query_groups} query groups"
        widths = " and ".join(map(str, _mlp_widths(a)))
        raise LayoutError(
            f"the model cannot be divided over {layout.tp} tensor-parallel ranks; "
            "nothing was written",
            found=f"{a.num_attention_heads} heads{groups}, an MLP of {widths}",
            expected=f"a size that divides them: {sizes}",
            fix="choose one of these for --tp",
        )
    if layout.vpp > 1 and layout.pp == 1:
        raise LayoutError(
            "virtual stages need a pipeline; nothing was written",
            found=f"--vpp {layout.vpp} with --pp 1",
            expected="--pp 2 or more",
            fix="leave out --vpp, or choose --pp",
        )


def _check_experts(a: Architecture, layout: Layout) -> None:
    """Raise LayoutError unless the experts can be divided like this."""
    experts = a.num_experts
    if experts is None:
        if layout.ep != 1:
            raise LayoutError(
                "a dense model has no experts to divide; nothing was written",
                found=f"--ep {layout.ep}",
                expected="--ep 1",
                fix="leave out --ep",
            )
        return
    if experts % layout.ep:
        raise LayoutError(
            f"{experts} experts cannot be divided among {layout.ep} ranks; nothing was written",
            found=f"--ep {layout.ep}",
            expected="a size that divides them: "
            + _choices(lambda ep: experts % ep == 0, experts, layout.ep),
            fix="choose one of these for --ep",
        )
    width, etp = a.moe_ffn_hidden_size, layout.expert_tp
    if width % etp:
        raise LayoutError(
            f"an expert cannot be divided over {etp} tensor-parallel ranks; nothing was written",
            found=f"a width of {width}, --etp {etp}"
            + (", which is that of --tp unless given" if layout.etp is None else ""),
            expected=f"a size that divides it: {_choices(lambda n: width % n == 0, width, etp)}",
            fix="choose one of these for --etp",
        )


def tensor_parallel_sizes(a: Architecture, most: int) -> list[int]:
    """The sizes up to `most` that tensor parallelism can have."""
    return [size for size in range(1, most + 1) if _can_be_tensor_parallel(a, size)]


def _mlp_widths(a: Architecture) -> list[int]:
    """Widths of the MLPs that tensor parallelism divides, experts left out."""
    widths = [a.ffn_hidden_size] if not all(a.moe_layers) else []
    return [*widths, *filter(None, [a.moe_shared_expert_intermediate_size])]


def _can_be_tensor_parallel(a: Architecture, tp: int) -> bool:
    """Whether every split dimension divides; groups may also be cut, as Megatron-Core 0.16 does."""
    split = (a.num_attention_heads, *_mlp_widths(a))
    if any(size % tp for size in split):
        return False
    if a.multi_latent_attention:
        return True
    return a.qkv_size % tp == 0 and (a.num_query_groups % tp == 0 or tp % a.num_query_groups == 0)


def _even(num_layers: int, layout: Layout) -> list[int]:
    count, rest = divmod(num_layers, layout.pp * layout.vpp)
    if not rest:
        return [count] * (layout.pp * layout.vpp)
    if layout.vpp > 1:
        fitting = _choices(lambda n: num_layers % (layout.pp * n) == 0, num_layers, layout.vpp)
        fix = f"choose one of these for --vpp with --pp {layout.pp}"
        if not fitting:
            fitting = _choices(lambda n: num_layers % n == 0, num_layers, layout.pp)
            fix = "choose one of these for --pp, without --vpp"
    else:
        fitting = _choices(lambda n: num_layers % n == 0, num_layers, layout.pp)
        fix = "choose one of these for --pp"
    stages = f"--pp {layout.pp}" + (f" --vpp {layout.vpp}" if layout.vpp > 1 else "")
    raise LayoutError(
        f"{num_layers} layers cannot be divided into {layout.pp * layout.vpp} equal stages; "
        "nothing was written",
        found=f"{stages}, {num_layers} layers",
        expected=f"a size that divides the layers: {fitting}",
        fix=f"{fix}, or say who gets which layers with --pipeline-model-parallel-layout",
    )


def _choices(fits: Callable[[int], bool], most: int, wanted: int) -> str:
    """The sizes that fit; where there are many, those next to the wanted one."""
    sizes = [size for size in range(1, most + 1) if fits(size)]
    nearest = sorted(sorted(sizes, key=lambda size: abs(size - wanted))[:_MOST_NAMED])
    return ", ".join(map(str, nearest))


def _parse(text: str, a: Architecture, pp: int) -> list[int]:
    """Layers per stage of a custom layout.

    E embedding, t layer, m layer that predicts further tokens, L loss, | next stage.
    """
    num_chunks(text, pp)
    stages = _unrolled(text).split("|")
    letters = "".join(stages)
    tail = "m" * a.mtp_num_layers + "L"
    middle = letters[1 : len(letters) - len(tail)]
    if not (letters.startswith("E") and stages[-1].endswith(tail) and set(middle) <= {"t"}):
        further = "m for every one that predicts further tokens, " if a.mtp_num_layers else ""
        raise LayoutError(
            "the pipeline layout cannot be read; nothing was written",
            found=text,
            expected=f"E (embedding) first, t for every layer, {further}L (loss) last, "
            "| between stages; t*4 and (tt|)*3 repeat",
            fix="correct --pipeline-model-parallel-layout",
        )
    if letters.count("t") != a.num_layers:
        raise LayoutError(
            "the pipeline layout has another number of layers; nothing was written",
            found=f"{letters.count('t')} layers in {text}",
            expected=f"{a.num_layers} layers",
            fix="correct --pipeline-model-parallel-layout",
        )
    return [stage.count("t") for stage in stages]


def _unrolled(text: str) -> str:
    text = re.sub(r"[,\s]", "", text)
    for pattern in (r"\(([^()]+)\)\*(\d{1,5})", r"(.)\*(\d{1,5})"):
        text = re.sub(pattern, lambda hit: hit[1] * int(hit[2]), text)
        if len(text) > _MOST_RANKS:
            raise LayoutError("the pipeline layout is too long", found=f"{len(text)} letters")
    return text

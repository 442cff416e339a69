"""What goes into a Megatron checkpoint: arguments, vocabulary padding, every rank's part.

    OUT/iter_0001000/ or release/        the ranks' files, see formats/
        tokenizer/                       the tokenizer's files, where there are any
        megatron_args.sh                 launch arguments that rebuild the model
        latest_checkpointed_iteration.txt    last: Megatron looks for it first

A model that was never an iteration of Megatron is a `release`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from . import experts, topology
from . import tokenizer_wordpiece as wordpiece
from .architecture import Architecture
from .arguments import OWN
from .checkpoint import Checkpoint, Layout
from .conversion import (
    Conversion,
    check_dtype,
    choose_tokenizer,
    main_dtype,
    stored_rows,
    stored_tokens,
    true_vocabulary,
)
from .dialects import CORE, WRITABLE
from .dialects.modules import Modules
from .documents import special_tokens
from .dtypes import DTYPES
from .errors import LayoutError, UnsupportedError, UsageError
from .formats import megatron_torch, megatron_torch_dist
from .formats.folders import TRACKER
from .formats.megatron_torch import RankModel
from .formats.megatron_torch_dist import Chunk, RankChunks, Stacking
from .formats.torch_zip import Weight
from .layouts import Stage, num_chunks, plan_stages
from .mapping import RuleTable
from .megatron_args import (
    Target,
    carried_arguments,
    ignored_by_training,
    launch_script,
    layout_arguments,
    model_arguments,
    precision_arguments,
)
from .ops import resize_rows
from .parameters import COPIES, FLOAT32, VOCABULARY
from .plan import ConversionPlan, parse_size
from .t5_arguments import writable_impl
from .tensors import LazyTensor
from .tokenizer import Tokenizer
from .version import __version__

_TOKENIZER = "tokenizer"
_DEFAULT_DIVISOR = 128
Tensors = Mapping[str, LazyTensor]
FORMATS = (megatron_torch.NAME, megatron_torch_dist.NAME)


def plan_conversion(
    checkpoint: Checkpoint,
    *,
    to: str,
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    ep: int = 1,
    etp: int | None = None,
    pipeline_model_parallel_layout: str | None = None,
    transformer_impl: str | None = None,
    make_vocab_size_divisible_by: int | None = None,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    vocab_padding: str | None = None,
    tokenizer: str | None = None,
) -> Conversion:
    """Decide everything about a Megatron checkpoint; nothing is written.

    Args:
        checkpoint: an open checkpoint.
        to: `torch` or `torch_dist`.
        tp, pp, vpp, ep, etp: parallel sizes; without `etp` experts are divided like the rest.
        pipeline_model_parallel_layout: Megatron's string for a custom pipeline.
        transformer_impl: `transformer_engine` or `local`; None keeps the source's.
        make_vocab_size_divisible_by: None keeps the source's, or is 128.
        dtype: `auto` as stored, or `float32`, `bfloat16` or `float16`.
        max_shard_size: of one `.distcp` file; a `torch` rank is one file whatever its size.
        vocab_padding: `keep` all rows the source has, or `trim` to what the layout needs; None
            trims where the true size is known.
        tokenizer: see `hf_folder.plan_conversion`.

    Raises:
        LayoutError: the model cannot be divided like this.
        UnsupportedError: Megatron-Core does not compute this model.
        UsageError: options that contradict each other or the checkpoint.
    """
    check_dtype(dtype)
    if checkpoint.architecture.kind == "bert":
        raise UnsupportedError(
            "mtt reads BERT, and does not write it as a Megatron checkpoint; nothing was written",
            found=f"{checkpoint.folder}, a BERT, to {to}",
            expected="a GPT or a T5",
            fix="convert it with --to hf",
        )
    _check_choices(transformer_impl, make_vocab_size_divisible_by)
    if pipeline_model_parallel_layout is not None:
        vpp = _chunks_of(pipeline_model_parallel_layout, pp, vpp)
    impl = writable_impl(checkpoint.architecture, transformer_impl, _source_impl(checkpoint))
    layout = Layout(tp, pp, 1 if vpp is None else vpp, ep, etp)
    _check_parts(checkpoint.architecture, layout, to, impl)
    target = Target(
        format=to,
        layout=layout,
        transformer_impl=impl,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by or _source_divisor(checkpoint),
        pipeline_layout=pipeline_model_parallel_layout,
        **_grouped_gemm(checkpoint, impl),
    )
    stages = plan_stages(checkpoint.architecture, target.layout, target.pipeline_layout)
    warnings = list(checkpoint.warnings)
    words = choose_tokenizer(checkpoint, tokenizer)
    true_size = true_vocabulary(checkpoint, words, vocab_padding, warnings)
    tokens = special_tokens(
        words, checkpoint.config or stored_tokens(checkpoint), checkpoint.architecture.kind
    )
    rows = stored_rows(checkpoint)
    needed = rows if vocab_padding == "keep" or true_size is None else true_size
    padded = target.padded_vocab_size(needed)
    architecture = replace(
        checkpoint.architecture, vocab_size=true_size or rows, padded_vocab_size=padded
    )
    warnings += ignored_by_training(architecture)
    tensors = {
        name: resize_rows(tensor, min(rows, padded), padded) if name in VOCABULARY else tensor
        for name, tensor in checkpoint.tensors.items()
    }
    stored = main_dtype(tensors) if dtype == "auto" else dtype
    args = _arguments(checkpoint, architecture, words, stored)
    args[OWN] = {**_own(args), "rows": min(rows, padded), "special_tokens": tokens}
    trained = checkpoint.iteration is not None and checkpoint.iteration >= 0
    folder = f"iter_{checkpoint.iteration:07d}" if trained else "release"
    if architecture.kind == "t5":
        tensors |= {name: tensors[first] for name, first in COPIES.items() if first in tensors}
    writer = _Writer(target, architecture, stages, tensors, args, dtype)
    iteration = (checkpoint.iteration or 0) if trained else 0
    if to == "torch":
        files = megatron_torch.plan_files(folder, target.layout, writer.models(), iteration)
        documents: dict[str, bytes] = {}
    else:
        files, documents = megatron_torch_dist.plan_files(
            folder,
            writer.chunks(),
            Stacking(
                None if len(set(architecture.moe_layers)) > 1 else _num_layers(architecture),
                architecture.num_experts or 1,
            ),
            writer.common(iteration),
            parse_size(max_shard_size),
        )
    documents |= {f"{_TOKENIZER}/{name}": data for name, data in words.files.items()}
    documents["megatron_args.sh"] = launch_script(
        writer.arguments(0), _TOKENIZER if words.files else None, true_size or rows, __version__
    )
    documents[TRACKER] = (str(checkpoint.iteration) if trained else "release").encode()
    plan = ConversionPlan(files, documents, checkpoint.replicas)
    return Conversion(
        checkpoint=checkpoint,
        plan=plan,
        config={"vocab_size": padded, "layout": str(target.layout)},
        tokens=tokens,
        dtype=stored,
        tokenizer=words,
        warnings=tuple(warnings),
        model_type="",
    )


def _check_choices(transformer_impl: str | None, divisor: int | None) -> None:
    if transformer_impl is not None and transformer_impl not in WRITABLE:
        raise UsageError(
            f"unknown transformer implementation {transformer_impl!r}",
            expected=" or ".join(WRITABLE),
        )
    if divisor is not None and divisor < 1:
        raise UsageError(
            "an impossible --make-vocab-size-divisible-by", found=str(divisor), expected="1 or more"
        )


def _check_parts(a: Architecture, layout: Layout, to: str, impl: str) -> None:
    """Raise for an expert that is divided otherwise than Megatron can, or down projections."""
    etp, tp = layout.etp, layout.tp
    if a.num_experts is not None and a.add_bias_linear:
        raise UnsupportedError(
            "Megatron-Core's router has a bias where linear layers have one; nothing was written",
            found="experts with add_bias_linear = True, and a router without a bias",
            expected="linear layers without biases",
            fix="convert it with --to hf, which can represent it",
        )
    if etp is not None and a.num_experts is None and etp not in (1, tp):
        raise UsageError(
            "a dense model has no experts to divide",
            found=f"--etp {etp}",
            expected="none",
            fix="leave out --etp",
        )
    if a.num_experts is not None and to == megatron_torch.NAME and etp and tp % etp:
        raise LayoutError(
            "ranks that hold different parts of experts would write the same file; "
            "nothing was written",
            found=f"--etp {etp} with --tp {tp}",
            expected=f"a size that divides {tp}",
            fix="choose another --etp, or --to torch_dist",
        )
    if a.multi_latent_attention and impl == "local":
        sizes = (a.q_lora_rank or tp, a.kv_lora_rank + a.qk_pos_emb_head_dim)
        if any(size % tp for size in sizes):
            raise LayoutError(
                f"local layers cannot divide the down projections over {tp} ranks; "
                "nothing was written",
                found=f"{sizes[0]} and {sizes[1]} rows",
                expected=f"multiples of {tp}",
                fix="choose another --tp, or --transformer-impl transformer_engine",
            )


def _grouped_gemm(checkpoint: Checkpoint, impl: str) -> dict[str, bool]:
    """Whether a rank's experts are one module, as the source says; else what is fastest."""
    if checkpoint.architecture.num_experts is None:
        return {}
    named = checkpoint.args.get("moe_grouped_gemm")
    is_grouped = named if isinstance(named, bool) else impl != "local"
    is_legacy = checkpoint.args.get("moe_use_legacy_grouped_gemm") is True
    return {"grouped_gemm": is_grouped, "legacy_grouped_gemm": is_grouped and is_legacy}


def _chunks_of(layout: str, pp: int, vpp: int | None) -> int:
    """Virtual chunks of a custom pipeline, which a given size must agree with."""
    if pp < 1:
        raise UsageError("an impossible --pp", found=str(pp), expected="at least 1")
    count = num_chunks(layout, pp)
    if vpp not in (None, count):
        raise UsageError(
            "--vpp contradicts the pipeline layout",
            found=f"--vpp {vpp}",
            expected=f"{count}, the stages of {layout} over {pp} ranks",
            fix="leave out --vpp",
        )
    return count


def _source_impl(checkpoint: Checkpoint) -> str:
    named = checkpoint.args.get("transformer_impl")
    known = isinstance(named, str) and named in WRITABLE and checkpoint.dialect in CORE
    return str(named) if known else "transformer_engine"


def _source_divisor(checkpoint: Checkpoint) -> int:
    value = checkpoint.args.get("make_vocab_size_divisible_by")
    return value if type(value) is int and value > 0 else _DEFAULT_DIVISOR


def _arguments(
    checkpoint: Checkpoint, architecture: Architecture, words: Tokenizer, dtype: str
) -> dict[str, object]:
    """Megatron's arguments, but for those of the layout."""
    args = carried_arguments(checkpoint.args)
    args |= model_arguments(architecture)
    args |= precision_arguments(dtype, checkpoint.args, architecture)
    if words.files:
        args |= {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": _TOKENIZER}
        args |= {"vocab_file": None, "merge_file": None}
        if own := wordpiece.megatron_arguments(words.files):
            args |= {**own, "vocab_file": f"{_TOKENIZER}/{wordpiece.FILE}"}
    return args


def _num_layers(a: Architecture) -> dict[str, int]:
    return {"encoder": a.encoder_num_layers, "decoder": a.num_layers}


def _own(args: Mapping[str, object]) -> dict[str, object]:
    own = args[OWN]
    assert isinstance(own, dict)
    return own


class _Writer:
    """Cuts whole tensors into what each rank of a target holds.

    Rank r of a stage is tensor-parallel rank r % TP; within an expert rank r % ETP of those that
    have experts r // ETP % EP. (Source: RankGenerator, core/parallel_state.py.)
    """

    def __init__(
        self,
        target: Target,
        architecture: Architecture,
        stages: tuple[Stage, ...],
        tensors: Tensors,
        args: Mapping[str, object],
        dtype: str,
    ) -> None:
        self._target, self._architecture, self._stages = target, architecture, stages
        self._layout = target.layout
        self._tensors, self._args, self._dtype = tensors, args, dtype
        dialect = WRITABLE[target.transformer_impl]
        self._names: RuleTable = dialect.RULES.inverse
        is_t5 = architecture.kind == "t5"
        self._modules: Modules = dialect.T5_MODULES if is_t5 else dialect.MODULES
        self._num_local = (architecture.num_experts or 0) // target.layout.ep
        self._of_stage: dict[tuple[Stage, int], list[str]] = {}
        for stage in stages:
            parts: list[list[str]] = [[] for _ in range(target.layout.ep)]
            for name in topology.stage_names(tensors, stage):
                for part in parts if not topology.is_of_expert(name) else [parts[self._rank(name)]]:
                    part.append(name)
            self._of_stage |= {(stage, ep): part for ep, part in enumerate(parts)}

    def arguments(self, rank: int) -> dict[str, object]:
        """The arguments that a rank stores."""
        layout = layout_arguments(self._architecture, self._target, rank)
        return dict(sorted({**self._args, **layout}.items()))

    def models(self) -> list[RankModel]:
        """For `torch`: every rank's state dicts."""
        size = self._target.stage_size
        return [
            RankModel(
                rank % self._layout.tp,
                pp,
                self._expert_rank(rank),
                self.arguments(pp * size + rank),
                tuple(self._state_dict(stage, rank) for stage in self._stages if stage.pp == pp),
            )
            for pp in range(self._layout.pp)
            for rank in range(size)
        ]

    def _expert_rank(self, rank: int) -> int:
        return rank // self._layout.expert_tp % self._layout.ep

    def _place(self, name: str, rank: int) -> tuple[int, int]:
        """Among how many ranks a parameter is divided, and which of them this one is."""
        if topology.is_of_expert(name):
            return self._layout.expert_tp, rank % self._layout.expert_tp
        if topology.may_be_whole(name) and self._target.transformer_impl != "local":
            return 1, 0
        return self._layout.tp, rank % self._layout.tp

    def _rank(self, name: str) -> int:
        """The expert-parallel rank that has a parameter of an expert."""
        return topology.expert_number(name) // self._num_local

    def _state_dict(self, stage: Stage, rank: int) -> dict[str, Weight | None]:
        held = {}
        for name, tensor in self._held(stage, self._expert_rank(rank)):
            part = topology.cut(name, tensor, self._architecture, *self._place(name, rank))
            held[topology.local_name(name, stage)] = part
        named = experts.spelled(
            self._names.apply(held, self._architecture),
            self._target.expert_module,
            self._expert_rank(rank) * self._num_local,
        )
        entries = self._modules.state_dict(named)
        return {
            name: None if part is None else self._weight(name, part)
            for name, part in entries.items()
        }

    def _held(self, stage: Stage, ep: int) -> list[tuple[str, LazyTensor]]:
        """A stage's whole tensors; a tied output layer away from the embedding is a copy of it."""
        names = [*topology.copied_names(self._tensors, stage), *self._of_stage[stage, ep]]
        held = [(name, self._tensors[name]) for name in names]
        tied = not self._architecture.untie_embeddings_and_output_weights
        if tied and stage.last and stage.pp > 0:
            held.append((topology.TIED_HEAD, self._tensors[topology.EMBEDDING]))
        return held

    def chunks(self) -> list[RankChunks]:
        """For `torch_dist`: what every rank writes of the global tensors."""
        spelled = self._distributed_names()
        return [
            self._rank_chunks(pp, rank, spelled)
            for pp in range(self._layout.pp)
            for rank in range(self._target.stage_size)
        ]

    def _distributed_names(self) -> dict[str, str]:
        """Canonical name -> name in a distributed checkpoint, layers and experts numbered.

        Local layers call their norms as Transformer Engine's do, but for those of latent attention
        (`sharded_state_dict_keys_map` in core/models/gpt/gpt_layer_specs.py).
        """
        names = {name: name for name in self._tensors}
        if self._target.transformer_impl != "local" or self._architecture.multi_latent_attention:
            for match in self._names.resolve(self._tensors):
                names |= dict(zip(match.sources, match.targets, strict=True))
        return {name: experts.in_distributed_checkpoints(new) for name, new in names.items()}

    def _rank_chunks(self, pp: int, rank: int, spelled: Mapping[str, str]) -> RankChunks:
        chunks, objects = [], []
        for stage in self._stages:
            if stage.pp != pp:
                continue
            firsts = []
            for name in self._of_stage[stage, self._expert_rank(rank)]:
                is_first = rank == self._first(name, rank)
                if is_first or self._writes(name, rank):
                    chunks += self._chunks(name, spelled[name], rank)
                firsts += [spelled[name]] if is_first else []
            objects += self._modules.sharded_state(firsts)
        return RankChunks(tuple(chunks), tuple(objects))

    def _first(self, name: str, rank: int) -> int:
        """The first rank that has any of a parameter that this rank has a part of."""
        of_expert = topology.is_of_expert(name)
        return self._expert_rank(rank) * self._layout.expert_tp if of_expert else 0

    def _writes(self, name: str, rank: int) -> bool:
        """Whether a rank after the first has a part that no other has written."""
        count, index = self._place(name, rank)
        return count > 1 and topology.is_split(name) and rank == self._first(name, rank) + index

    def _chunks(self, name: str, spelled: str, rank: int) -> list[Chunk]:
        tensor = self._tensors[name]
        place = self._place(name, rank)
        return [
            Chunk(spelled, tensor.shape, box, self._weight(name, tensor.part(box)))
            for box in topology.boxes(name, tensor.shape, self._architecture, *place)
        ]

    def common(self, iteration: int) -> dict[str, object]:
        """What `common.pt` holds."""
        args = megatron_torch.namespace(self.arguments(0))
        return {"args": args, "checkpoint_version": 3.0, "iteration": iteration}

    def _weight(self, name: str, part: LazyTensor) -> Weight:
        dtype = part.dtype if self._dtype == "auto" else DTYPES[self._dtype]
        if name.endswith(FLOAT32):
            dtype = DTYPES["float32"]
        return Weight(name, part, dtype)

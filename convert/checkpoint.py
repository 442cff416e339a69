"""The values a checkpoint is while it travels from files to canonical names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .architecture import Architecture
from .tensors import LazyTensor


@dataclass(frozen=True, slots=True)
class Layout:
    """How many ways the model was split when it was written.

    `etp` is the tensor parallelism of experts; None if it is that of everything else.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int | None = None

    @property
    def expert_tp(self) -> int:
        """Tensor-parallel ranks that an expert is divided among."""
        return self.tp if self.etp is None else self.etp

    def __str__(self) -> str:
        text = f"TP{self.tp} x PP{self.pp}"
        text += f" x VPP{self.vpp}" if self.vpp > 1 else ""
        text += f" x EP{self.ep}" if self.ep > 1 else ""
        return text + (f" x ETP{self.etp}" if self.etp not in (None, self.tp) else "")


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank's model chunk holds, under the names in its file.

    `where` names the file in messages; `tp`, `pp`, `vpp`, `ep` are the rank's coordinates, `etp`
    the one among those that divide an expert, None if it is `tp`; `args` Megatron's arguments as
    this rank stored them.
    """

    where: str
    tensors: Mapping[str, LazyTensor]
    args: Mapping[str, object] | None = None
    tp: int = 0
    pp: int = 0
    vpp: int = 0
    ep: int = 0
    etp: int | None = None

    @property
    def expert_tp(self) -> int:
        """The rank among those that divide an expert."""
        return self.tp if self.etp is None else self.etp


@dataclass(frozen=True, slots=True)
class RawCheckpoint:
    """What a format reader found: shards under the writer's own names, nothing joined.

    Attributes:
        format: `torch`, `torch_dist`, ...
        folder: the folder the files are in.
        iteration: training step, or None for a release.
        args: Megatron's arguments by name, or None if the checkpoint has none.
        checkpoint_version: Megatron's stamp, 0 if missing.
        is_stamped: whether it was there.
        dropped: kind of state -> names of what was left out on purpose.
        evidence: why the reader decided for this format.
        num_files: files that hold model tensors.
        iterations: all iterations in the same root.
        replicated: what to do about copies that differ, unless the user says (see `replicas.py`).
        vocab_size: rows that are tokens, where a note beside the arguments says so.
        may_lack_head: whether an output layer would be a file of its own, which nothing misses.
        has_up_first: whether ranks have a gated MLP as [up | gate], whatever the names say.
    """

    format: str
    folder: str
    layout: Layout
    shards: tuple[Shard, ...]
    iteration: int | None = None
    args: Mapping[str, object] | None = None
    checkpoint_version: float = 3.0
    is_stamped: bool = True
    dropped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    evidence: tuple[str, ...] = ()
    num_files: int = 0
    iterations: tuple[int, ...] = ()
    replicated: str = "error"
    vocab_size: int | None = None
    may_lack_head: bool = False
    has_up_first: bool = False


@dataclass(frozen=True, slots=True)
class Replicas:
    """Tensors that must hold the same bytes: copies of one parameter on several ranks.

    `tied` marks the output layer that the last stage holds as a copy of the embedding; `within`
    says that all are of one file set, where no policy for ranks applies.
    """

    name: str
    tensors: tuple[LazyTensor, ...]
    where: tuple[str, ...]
    tied: bool = False
    within: bool = False


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model under canonical names: unsharded, global layer numbers, metadata only.

    Canonical names are those of Megatron-Core's distributed checkpoints, with numbered layers.

    Attributes:
        format: `torch`, `torch_dist`, or `hf` for a Hugging Face folder.
        dialect: whose names the files have: a generation of Megatron, or a family.
        generation: which releases spell names like that; empty for a Hugging Face folder.
        args: Megatron's arguments; of a Hugging Face folder only where its tokenizer is.
        config: `config.json` of a Hugging Face folder, else empty.
        replicated: what to do about copies that differ, unless the user says (see `replicas.py`).
    """

    format: str
    folder: str
    layout: Layout
    dialect: str
    architecture: Architecture
    tensors: Mapping[str, LazyTensor]
    iteration: int | None
    args: Mapping[str, object]
    replicas: tuple[Replicas, ...]
    dropped: Mapping[str, tuple[str, ...]]
    warnings: tuple[str, ...]
    evidence: tuple[str, ...]
    num_files: int
    iterations: tuple[int, ...]
    config: Mapping[str, object] = field(default_factory=dict)
    generation: str = ""
    replicated: str = "error"

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors, vocabulary padding included."""
        return sum(tensor.num_elements for tensor in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

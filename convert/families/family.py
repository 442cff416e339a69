"""A family: one class of transformers, or ours, as a table that is read in both directions.

    config.json  --architecture()-->  Architecture  --config()-->  config.json
    names of the class  <--rules-->  canonical names

A class represents an architecture if reading back what was written gives the same forward pass.
What differs is what stands in the way, and is named.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from ..architecture import PARAMS_DTYPES, Architecture
from ..argument_tables import Neutral
from ..errors import UnsupportedError
from ..mapping import RuleTable, shorten
from ..tensors import LazyTensor
from .fields import Config, Field

# What every class of transformers has, or had, in its configuration without computing with it.
_COMMON = frozenset(
    """
    _attn_implementation_autoset _commit_hash _name_or_path architectures attn_implementation
    auto_map begin_suppress_tokens bos_token_id dtype eos_token_id finetuning_task
    gradient_checkpointing id2label is_decoder is_encoder_decoder label2id model_type name_or_path
    output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
    return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params
    tf_legacy_loss tokenizer_class torch_dtype torchscript transformers_version
    transformers.js_config unsloth_fixed unsloth_version use_bfloat16 use_cache bad_words_ids
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty
    max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    pruned_heads quantization_config remove_invalid_values repetition_penalty temperature
    tie_encoder_decoder top_k top_p typical_p
    """.split()
)


Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True, slots=True)
class Limit:
    """What a class asks for that no field says, and what a user can do about it.

    The text may name fields of the architecture in braces: their values are told.
    """

    text: str
    holds: Callable[[Architecture], bool]
    fix: str | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family.

    Attributes:
        name: the `model_type` of `config.json`.
        kind: `kind` of the architectures it computes.
        causal_lm: the class with a language-model head.
        other_heads: classes with other heads that mtt knows too.
        base_model: the class without.
        prefix: what the names of the base model's tensors begin with in `causal_lm`.
        rules: the table of names for an architecture, canonical ones on the left, in the order
            the class has its modules in.
        fields: fields of `config.json` and what they say.
        fixed: what the class computes whatever its configuration says; a function is given the
            fields that have been read.
        defaults: the class's values of fields that `config.json` may leave out.
        neutral: fields that change the function in a way an `Architecture` cannot hold, with the
            values with which they do not.
        ignored: fields without a part in the forward pass.
        limits: what an architecture must fulfil besides.
        buffers: a pattern of tensors that older versions saved and none loads.
        respell: given tensors under any names the class reads, those under the names of `rules`.
        copies: what is stored more than once, for an architecture: name of the copy -> of what.
        as_stored: what a folder with these names computes of what `config.json` says.
        has_tp_plan, has_attention_backends: whether transformers can split the class over devices
            and choose its attention, in all versions mtt supports; `auto` takes no other.
        auto_map: where the Auto classes find code that travels with the weights.
        code: the package whose modules travel with the weights.
        auto_class: the Auto class that loads it.
    """

    name: str
    causal_lm: str
    base_model: str
    prefix: str
    kind: str = "gpt"
    other_heads: tuple[str, ...] = ()
    rules: Callable[[Architecture], RuleTable]
    fields: tuple[Field, ...]
    fixed: Mapping[str, object] = field(default_factory=dict)
    defaults: Config = field(default_factory=dict)
    neutral: Mapping[str, Neutral] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    limits: tuple[Limit, ...] = ()
    buffers: str = r"(.*\.)?rotary_emb\.inv_freq"
    respell: Callable[[Tensors, Architecture], Tensors] = lambda tensors, a: tensors
    copies: Callable[[Architecture], Mapping[str, str]] = lambda a: {}
    as_stored: Callable[[Architecture, Collection[str]], Architecture] = lambda a, names: a
    has_tp_plan: bool = True
    has_attention_backends: bool = True
    auto_map: Mapping[str, str] = field(default_factory=dict)
    code: str | None = None
    auto_class: str = "AutoModelForCausalLM"

    def architecture(self, config: Config) -> Architecture:
        """What a model with this `config.json` computes.

        Raises:
            UnsupportedError: something that an `Architecture` cannot hold, by the field's name.
        """
        values = {**self.defaults, **config}
        self._refuse(values)
        facts: dict[str, object] = {}
        try:
            for line in self.fields:
                facts |= line.read(values)
        except UnsupportedError as error:
            error.fix = error.fix or (
                f"correct config.json if it is wrong: mtt converts a {self.name} only with what "
                "is expected"
            )
            raise
        for name, value in self.fixed.items():
            facts[name] = value(facts) if callable(value) else value
        facts.setdefault("params_dtype", _dtype(config))
        try:
            return Architecture(**facts)  # type: ignore[arg-type]  # the fields checked them
        except UnsupportedError as error:
            error.fix = "correct config.json: it does not describe a model"
            raise

    def _refuse(self, values: Config) -> None:
        odd = {
            name: neutral
            for name, neutral in self.neutral.items()
            if name in values and not _is_one_of(values[name], neutral.values)
        }
        if odd:
            raise UnsupportedError(
                "the model computes something that mtt cannot represent",
                found="; ".join(f"{n} = {values[n]!r} ({odd[n].meaning})" for n in odd),
                expected="; ".join(f"{n} = {odd[n].values[0]!r}" for n in odd),
                fix=f"mtt converts a {self.name} without that",
            )

    def config(self, architecture: Architecture) -> dict[str, object]:
        """The fields of `config.json` that describe an architecture.

        Raises:
            UnsupportedError: the class does not compute the same function.
        """
        if misfits := self.misfits(architecture):
            raise UnsupportedError(
                f"{self.causal_lm} does not compute the same function",
                found="; ".join(misfits),
                expected=f"what a {self.name} can represent",
            )
        return self._write(architecture)

    def _write(self, architecture: Architecture) -> dict[str, object]:
        architecture = replace(architecture, add_qkv_bias=architecture.has_qkv_bias)
        config: dict[str, object] = {}
        for line in self.fields:
            config |= line.write(architecture)
        return config

    def misfits(self, architecture: Architecture) -> tuple[str, ...]:
        """What keeps the class from computing an architecture; nothing if it does, exactly."""
        if architecture.kind != self.kind:
            return (f"kind = {architecture.kind}",)
        found = [
            limit.text.format_map(vars(architecture))
            for limit in self.limits
            if not limit.holds(architecture)
        ]
        wanted = architecture.forward_pass()
        try:
            back = self.architecture(self._write(architecture)).forward_pass()
        except UnsupportedError as error:
            return (*found, error.found or error.message)
        different = [name for name in wanted if name in back and back[name] != wanted[name]]
        return (*found, *(f"{name} = {wanted[name]}" for name in different))

    def fix(self, architecture: Architecture) -> str | None:
        """What a user can do about a limit that does not hold."""
        return next((x.fix for x in self.limits if x.fix and not x.holds(architecture)), None)

    def unknown_fields(self, config: Config) -> list[str]:
        """Fields mtt does not know, of those that are set to something."""
        known = {*_COMMON, *self.neutral, *self.ignored}
        known |= {name for line in self.fields for name in line.names}
        return sorted(n for n, v in config.items() if n not in known and v not in (None, False))

    def warnings(self, config: Config) -> tuple[str, ...]:
        """What may make the result wrong without being known to."""
        unknown = self.unknown_fields(config)
        if not unknown:
            return ()
        return (
            f"config.json has fields mtt does not know: {shorten(unknown)}; "
            "if one of them changes what the model computes, the result is wrong",
        )


def _dtype(config: Config) -> str | None:
    """The element type of the weights, if it is one a model is trained in."""
    name = config.get("dtype") or config.get("torch_dtype")
    return name if isinstance(name, str) and name in PARAMS_DTYPES else None


def _is_one_of(value: object, values: tuple[object, ...]) -> bool:
    """Whether a value of JSON is one of these; 1 is not true, and 0 not false."""
    return any(value == other and type(value) is type(other) for other in values)

"""The engine on names alone."""

from dataclasses import replace

import pytest

from mtt_convert.architecture import Architecture
from mtt_convert.dialects import DIALECTS, Dialect
from mtt_convert.dtypes import DTYPES
from mtt_convert.errors import MappingError
from mtt_convert.families import FAMILIES
from mtt_convert.mapping import Rule, RuleTable
from mtt_convert.ops import SplitGated
from mtt_convert.parameters import expected
from mtt_convert.tensors import LazyTensor

TINY = Architecture(
    num_layers=1,
    hidden_size=4,
    ffn_hidden_size=4,
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=2,
    padded_vocab_size=8,
    max_position_embeddings=4,
    layernorm_epsilon=1e-5,
)


def test_a_becomes_b() -> None:
    (match,) = RuleTable(Rule("a", "b")).resolve(["a"])
    assert (match.sources, match.targets) == (("a",), ("b",))


def test_placeholders_and_alternatives() -> None:
    table = RuleTable(Rule("a.{i}.{p}", "b.{i}.{x,y}.{p}", SplitGated()))
    (match,) = table.resolve(["a.12.bias"])
    assert match.targets == ("b.12.x.bias", "b.12.y.bias")
    (back,) = table.inverse.resolve(match.targets)
    assert (back.sources, back.targets) == (match.targets, match.sources)


@pytest.mark.parametrize(
    ("table", "names", "culprit"),
    [
        (RuleTable(Rule("a", "b")), ["a", "c"], "c"),
        (RuleTable(Rule("a.{i}", "b.{i}"), Rule("a.0", "c")), ["a.0"], "a.0"),
        (RuleTable(Rule("{x,y}", "z")), ["x"], "without y"),
        (RuleTable(Rule("a", "c"), Rule("b", "c")), ["a", "b"], "c"),
        (RuleTable(Rule("a.{i}", "b.{i}")), ["a.one"], "a.one"),
    ],
    ids=["unmatched", "twice", "partial", "collision", "not a number"],
)
def test_every_name_is_accounted_for_once(table: RuleTable, names: list, culprit: str) -> None:
    with pytest.raises(MappingError) as error:
        table.resolve(names)
    assert culprit in str(error.value.found)


def test_dots_are_literal() -> None:
    with pytest.raises(MappingError):
        RuleTable(Rule("a.b", "c")).resolve(["axb"])


def tensor(*shape: int) -> LazyTensor:
    return LazyTensor.in_file(DTYPES["float32"], shape, "file", 0)


BERT = replace(
    TINY,
    kind="bert",
    num_tokentypes=2,
    bert_binary_head=True,
    position_embedding_type="learned_absolute",
)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("gated", [False, True])
def test_every_family_rule_undoes_itself(family: str, gated: bool) -> None:
    architecture = replace(TINY, gated_linear_unit=gated)
    if family in ("gpt2", "gpt_neox"):
        rotary = family == "gpt_neox"
        kind = "rope" if rotary else "learned_absolute"
        architecture = replace(TINY, num_query_groups=2, position_embedding_type=kind)
    if family in ("bloom", "falcon"):
        architecture = replace(
            TINY,
            position_embedding_type="alibi" if family == "bloom" else "rope",
            embedding_norm=family == "bloom",
            parallel_residual=family == "falcon" and gated,
        )
    if family == "megatron-bert":
        architecture = replace(BERT, num_tokentypes=2 * gated)
    source = {name: tensor(*shape) for name, shape in expected(architecture).items()}
    table = FAMILIES[family].rules(architecture)
    back = table.inverse.apply(table.apply(source, architecture), architecture)
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in source.items()}


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
@pytest.mark.parametrize("untied", [False, True])
def test_every_dialect_can_be_written(dialect: Dialect, untied: bool) -> None:
    own = {"gpt": TINY, "bert": BERT}[dialect.kind]
    architecture = replace(own, untie_embeddings_and_output_weights=untied)
    names = [
        name for name in expected(architecture) if "_layernorm." not in name or "final" in name
    ]
    table = dialect.rules
    written = [match.targets[0] for match in table.inverse.resolve(names)]
    assert [match.targets[0] for match in table.resolve(written)] == names

"""What is written is what Python and torch read."""

from __future__ import annotations

import argparse
import collections
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtt_convert.dtypes import DTYPES
from mtt_convert.formats.pickle_writer import Call, Global, Instance, Pairs, dumps
from mtt_convert.formats.pickles import load_pickle

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**200), 2**200)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner)
    ),
)


@given(PLAIN)
def test_plain_values_come_back(value):
    assert pickle.loads(dumps(value)) == value
    assert dumps(value) == dumps(value)


def test_named_objects():
    ordered = Call(Global("collections", "OrderedDict"), (), {"b": 1, "a": None})
    namespace = Instance(Global("argparse", "Namespace"), {"x": 1, "dtype": DTYPES["bfloat16"]})
    value = pickle.loads(dumps([ordered, namespace, ordered]))
    assert value[0] == collections.OrderedDict(b=1, a=None) == value[2]
    assert list(value[0]) == ["b", "a"]
    assert value[1] == argparse.Namespace(x=1, dtype=torch.bfloat16)


def test_keys_that_are_objects():
    size = Call(Global("torch", "Size"), ((2, 3),))
    assert pickle.loads(dumps(Pairs(((size, "x"), ("y", size))))) == {
        torch.Size([2, 3]): "x",
        "y": torch.Size([2, 3]),
    }


def test_many_names_and_texts_share_a_memo():
    names = [f"name {number}" for number in range(300)]
    data = dumps([names, names])
    assert pickle.loads(data) == [names, names]
    assert len(data) < 1.4 * len(dumps(names))


def test_our_own_reader_reads_it():
    namespace = Instance(Global("argparse", "Namespace"), {"tp": 2})
    assert load_pickle(dumps({"args": namespace}), "here")["args"].fields == {"tp": 2}


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", 1j])
def test_other_objects_are_refused(value):
    with pytest.raises(TypeError, match="is not written into pickles"):
        dumps([value])

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtt_convert.boxes import intersect, row_major, split_interval, tiles, windows

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


def test_intersect_is_the_common_part() -> None:
    assert intersect(((0, 0), (4, 4)), ((2, 1), (4, 2))) == ((2, 1), (2, 2))
    assert intersect(((0,), (2,)), ((2,), (2,))) is None


@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 9))
def test_split_interval_covers_the_interval_in_order(start: int, length: int, inner: int) -> None:
    covered = [
        (row + r) * inner + column + c
        for row, num_rows, column, num_columns in split_interval(start, length, inner)
        for r in range(num_rows)
        for c in range(num_columns)
    ]
    assert covered == list(range(start, start + length))


@given(SHAPES, st.integers(1, 30))
def test_windows_are_contiguous_and_cover_everything(shape: tuple[int, ...], limit: int) -> None:
    position, strides = 0, row_major(shape)
    for start, sizes in windows(shape, limit):
        assert prod(sizes) <= limit
        assert sum(s * step for s, step in zip(start, strides, strict=True)) == position
        position += prod(sizes)
    assert position == prod(shape)


@pytest.mark.parametrize(
    ("boxes", "whole"),
    [
        ([((0, 0), (2, 3))], True),
        ([((0, 0), (1, 3)), ((1, 0), (1, 3))], True),
        ([((0, 0), (2, 1)), ((0, 1), (2, 2))], True),
        ([((0, 0), (1, 3))], False),
        ([((0, 0), (2, 2)), ((0, 0), (2, 1))], False),
        ([((0, 0), (2, 2)), ((0, 1), (2, 1))], False),
        ([((0, 0), (3, 2))], False),
        ([], False),
    ],
)
def test_tiles_knows_gaps_overlaps_and_overhang(boxes: list, whole: bool) -> None:
    assert tiles(boxes, (2, 3)) is whole

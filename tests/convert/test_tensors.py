"""The algebra of lazy tensors against numpy's, through real files."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtt_convert.dtypes import DTYPES
from mtt_convert.reading import FileReader, stream
from mtt_convert.tensors import LazyTensor, concat, stack, zeros

INT32 = DTYPES["int32"]


@pytest.fixture(scope="session")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tensors") / "numbers.bin"
    np.arange(5000, dtype=np.int32).tofile(path)
    return path


def read(tensor: LazyTensor, window_bytes: int) -> np.ndarray:
    with FileReader() as reader:
        data = b"".join(bytes(window) for window in stream(tensor, reader, window_bytes))
    return np.frombuffer(data, np.int32).reshape(tensor.shape)


def pair(path: Path, shape: tuple[int, ...], first: int) -> tuple[LazyTensor, np.ndarray]:
    count = int(np.prod(shape))
    values = np.arange(first, first + count, dtype=np.int32).reshape(shape)
    return LazyTensor.in_file(INT32, shape, str(path), 4 * first), values


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_chain_of_operations_equals_numpy(numbers: Path, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3)))
    tensor, values = pair(numbers, shape, data.draw(st.integers(0, 50)))
    for _ in range(data.draw(st.integers(1, 6))):
        axis = data.draw(st.integers(0, len(tensor.shape) - 1))
        size = tensor.shape[axis]
        match data.draw(st.sampled_from(["narrow", "permute", "unflatten", "flatten", "concat"])):
            case "narrow":
                start = data.draw(st.integers(0, size - 1))
                length = data.draw(st.integers(1, size - start))
                tensor = tensor.narrow(axis, start, length)
                values = values.take(range(start, start + length), axis)
            case "permute":
                order = data.draw(st.permutations(range(len(tensor.shape))))
                tensor, values = tensor.permute(*order), values.transpose(order)
            case "unflatten":
                inner = data.draw(st.sampled_from([n for n in (1, 2, 3) if size % n == 0]))
                tensor = tensor.unflatten(axis, size // inner, inner)
                values = values.reshape(tensor.shape)
            case "flatten" if axis + 1 < len(tensor.shape):
                tensor = tensor.flatten(axis)
                values = values.reshape(tensor.shape)
            case "concat" if tensor.num_elements < 500:
                tensor = concat([tensor, tensor], axis)
                values = np.concatenate([values, values], axis)
    assert tensor.shape == values.shape
    window = data.draw(st.sampled_from([4, 12, 64, 1 << 20]))
    np.testing.assert_array_equal(read(tensor, window), values)


def test_stack_and_unstack_are_inverse(numbers: Path) -> None:
    parts = [pair(numbers, (2, 3), first)[0] for first in (0, 100, 30)]
    assert list(stack(parts).unstack()) == parts
    np.testing.assert_array_equal(read(stack(parts), 8)[2], pair(numbers, (2, 3), 30)[1])


def test_zeros_stand_in_no_file(numbers: Path) -> None:
    tensor, values = pair(numbers, (2, 3), 7)
    padded = concat([tensor, zeros(INT32, (2, 3))])
    np.testing.assert_array_equal(read(padded, 8), np.vstack([values, np.zeros((2, 3), int)]))


def test_a_transposed_tensor_larger_than_a_window(numbers: Path) -> None:
    tensor, values = pair(numbers, (60, 70), 0)
    np.testing.assert_array_equal(read(tensor.permute(1, 0), 280), values.T)


def test_sparse_columns_are_read_run_by_run(numbers: Path) -> None:
    tensor, values = pair(numbers, (60, 70), 0)
    with FileReader() as reader:
        for _ in stream(tensor.narrow(1, 10, 5), reader):
            pass
        assert reader.num_bytes == 60 * 5 * 4
    np.testing.assert_array_equal(read(tensor.narrow(1, 10, 5), 1 << 20), values[:, 10:15])

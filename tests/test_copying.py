"""Copies out of files: bit for bit what numpy makes, whatever lies where."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from jft.weights.copying import is_finite, own_copy

FLOATS = (np.float32, ml_dtypes.bfloat16, np.float16, np.float64)
SHAPES = ((), (3,), (0, 4), (70, 130), (257, 129), (5, 7, 9), (64, 96, 3, 3), (130, 64, 3, 2))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_copy_has_the_bits_of_numpys_in_c_order_and_memory_of_its_own(shape, dtype):
    whole = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    whole.flags.writeable = False
    for source in (whole[1], whole[1].astype(ml_dtypes.bfloat16)):
        for axes in itertools.permutations(range(len(shape))):
            for view in (source.transpose(axes), source.transpose(axes)[1:] if shape else source):
                copy = own_copy(view, np.dtype(dtype))
                wanted = np.array(view, dtype=dtype, order="C")
                assert copy.shape == wanted.shape and copy.tobytes() == wanted.tobytes()
                assert copy.flags.c_contiguous and copy.flags.writeable and copy.flags.owndata


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_found_wherever_it_stands(dtype, value):
    numbers = np.full(300_000, np.finfo(np.float16).max, np.float32).astype(dtype)
    numbers[::2] *= -1
    assert is_finite(numbers) and is_finite(numbers[:0]) and is_finite(numbers.reshape(3, -1))
    for at in (0, 262_143, 262_144, 299_999):
        bad = numbers.copy()
        bad[at] = value
        assert not is_finite(bad)


def test_what_overflows_in_a_cast_is_found():
    assert not is_finite(own_copy(np.array([1e39]), np.dtype(np.float32)))
    assert not is_finite(own_copy(np.array([7e4], np.float32), np.dtype(np.float16)))

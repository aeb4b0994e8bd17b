from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flep_fl.contracts.errors import LayoutError
from flep_fl.model_security.contribution import average, weighted_vector
from flep_fl.model_security.layout import FIXED_DTYPES, ModelLayout

FLOATS = st.sampled_from([np.float16, np.float32, np.float64])
TENSOR = FLOATS.flatmap(
    lambda dtype: hnp.arrays(
        dtype,
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
        elements=hnp.from_dtype(np.dtype(dtype), allow_nan=False, allow_infinity=False),
    )
)
FIXED = st.sampled_from(FIXED_DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3))
)
MODEL = st.dictionaries(st.text(max_size=12), st.one_of(TENSOR, FIXED), max_size=5).flatmap(
    lambda model: TENSOR.map(lambda tensor: model | {"a float at least": tensor})
)


@settings(max_examples=25, deadline=None)
@given(model=MODEL)
def test_flatten_and_unflatten_are_inverse(model):
    layout = ModelLayout.of(model)
    flat = layout.flatten(model)
    assert flat.size == layout.size == sum(a.size for a in model.values() if a.dtype.kind == "f")
    restored = layout.unflatten(flat)
    assert list(restored) == list(model)
    for name, array in model.items():
        assert restored[name].dtype == array.dtype
        np.testing.assert_array_equal(restored[name], array)


@settings(max_examples=25, deadline=None)
@given(model=MODEL)
def test_a_layout_survives_its_json(model):
    layout = ModelLayout.of(model)
    again = ModelLayout.from_json(layout.to_json())
    assert again == layout and again.digest == layout.digest


@settings(max_examples=25, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_is_a_layout_or_a_layout_error(text):
    try:
        ModelLayout.from_json(text)
    except LayoutError:
        return
    pytest.fail("random text was taken for a layout")


@settings(max_examples=25, deadline=None)
@given(
    flat=hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(-50, 50)),
    counts=st.lists(st.integers(1, 1000), min_size=1, max_size=6),
)
def test_equal_models_average_to_themselves(flat, counts):
    total = sum(weighted_vector(flat, count, 1000, 64.0) for count in counts)
    np.testing.assert_allclose(average(total), flat, rtol=1e-12, atol=1e-12)

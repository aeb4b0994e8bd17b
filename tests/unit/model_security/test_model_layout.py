from __future__ import annotations

import numpy as np
import pytest

from flep_fl.contracts.errors import LayoutError, WeightRangeError
from flep_fl.model_security.layout import ModelLayout


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "conv.weight": rng.normal(size=(4, 1, 3, 3)).astype(np.float32),
        "conv.bias": rng.normal(size=4).astype(np.float16),
        "scale": np.float64(1.5).reshape(()),
    }


def test_flatten_and_unflatten_keep_values_shapes_and_dtypes():
    model = arrays()
    layout = ModelLayout.of(model)
    flat = layout.flatten(dict(reversed(model.items())))  # the layout's order counts, not the mapping's
    assert flat.dtype == np.float64 and flat.shape == (layout.size,) == (41,)
    restored = layout.unflatten(flat)
    assert list(restored) == list(model)
    for name, array in model.items():
        assert restored[name].dtype == array.dtype and restored[name].shape == array.shape
        assert np.array_equal(restored[name], array)


def test_digest_tells_order_shape_and_dtype_apart():
    model = arrays()
    base = ModelLayout.of(model)
    assert ModelLayout.from_json(base.to_json()) == base
    assert len(base.digest) == 64
    others = [
        dict(reversed(model.items())),
        model | {"conv.bias": model["conv.bias"].astype(np.float32)},
        model | {"conv.bias": model["conv.bias"].reshape(2, 2)},
    ]
    assert len({base.digest, *(ModelLayout.of(other).digest for other in others)}) == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("conv.bias"), "'conv.bias' is missing"),
        (lambda m: m.update(extra=m["scale"]), "'extra' is not part"),
        (lambda m: m.update({"conv.bias": m["conv.bias"][:3]}), "(3,)"),
        (lambda m: m.update({"conv.bias": m["conv.bias"].astype(np.float64)}), "float64"),
    ],
)
def test_a_model_that_differs_is_refused_by_tensor_name(change, words):
    layout = ModelLayout.of(arrays())
    other = arrays()
    change(other)
    with pytest.raises(LayoutError, match=r"'conv\.bias'|'extra'") as caught:
        layout.flatten(other)
    assert words in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_tensor_name(bad):
    model = arrays()
    model["conv.weight"][0, 0, 1, 1] = bad
    with pytest.raises(WeightRangeError, match=r"conv\.weight"):
        ModelLayout.of(model).flatten(model)


def test_integer_buffers_are_not_supported_yet():
    with pytest.raises(LayoutError, match=r"'steps'.*not supported yet.*GroupNorm"):
        ModelLayout.of(arrays() | {"steps": np.array(3)})


def test_unflatten_refuses_another_length_and_values_beyond_the_dtype():
    layout = ModelLayout.of(arrays())
    with pytest.raises(LayoutError, match="shape"):
        layout.unflatten(np.zeros(layout.size + 1))
    with pytest.raises(WeightRangeError, match=r"conv\.bias"):
        layout.unflatten(np.full(layout.size, 1e6))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[1]",
        '[["a",[2],"int8"]]',
        '[["a",[-1],"float32"]]',
        '[["a",[true],"float32"]]',
        '[["a", [2], "float32"]]',  # spaces: not canonical
        "[" * 5000,
        "\ud800",
    ],
)
def test_a_damaged_description_is_a_layout_error(text):
    with pytest.raises(LayoutError):
        ModelLayout.from_json(text)

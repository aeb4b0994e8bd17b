from __future__ import annotations

import numpy as np
import pytest

from flep_fl.contracts.errors import LayoutError, WeightRangeError
from flep_fl.model_security.contribution import average, weighted_vector
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


def test_integers_and_bools_are_not_sent_and_stay_those_of_the_first_model():
    first = arrays() | {"steps": np.array(3), "mask": np.array([True, False]), "big": np.array(2**64 - 1)}
    layout = ModelLayout.of(first)
    assert layout.size == ModelLayout.of(arrays()).size
    trained = first | {"steps": np.array(70), "mask": np.array([False, False])}
    restored = layout.unflatten(layout.flatten(trained))
    assert list(restored) == list(first)
    for name in ("steps", "mask", "big"):
        assert restored[name].dtype == first[name].dtype and np.array_equal(restored[name], first[name])
    again = ModelLayout.from_json(layout.to_json())
    assert again == layout and again.unflatten(layout.flatten(first))["big"] == 2**64 - 1
    # sites that start with different ones do not have the same model
    assert ModelLayout.of(trained).digest != layout.digest
    with pytest.raises(LayoutError, match="'steps'"):
        layout.flatten(first | {"steps": np.array(3, dtype=np.int32)})


def test_a_model_of_integers_only_or_of_too_many_is_refused():
    with pytest.raises(LayoutError, match="no parameters"):
        ModelLayout.of({"steps": np.array(3)})
    for tables in ({"a": np.zeros(65537, int)}, {"a": np.zeros(65536, bool), "b": np.zeros(1, bool)}):
        with pytest.raises(LayoutError, match=r"65536.*65537.*persistent=False"):
            ModelLayout.of(arrays() | tables)


def test_a_description_beyond_what_travels_is_refused():
    with pytest.raises(LayoutError, match="too long"):
        ModelLayout.of(arrays() | {"table": np.full(50_000, -(10**17))})


@pytest.mark.parametrize("dtype", ["complex64", "longdouble", "U3", "V2", "O", "M8[s]"])
def test_other_dtypes_are_refused_by_name(dtype):
    with pytest.raises(LayoutError, match=r"'odd' has dtype .*\.float\(\)"):
        ModelLayout.of(arrays() | {"odd": np.zeros(2, dtype=dtype)})


def test_bfloat16_does_not_reach_the_layout():
    """Flower's own Array refuses it; this is why the layout has no rule for it."""
    torch, app = pytest.importorskip("torch"), pytest.importorskip("flwr.app")
    with pytest.raises(TypeError, match="BFloat16"):
        app.Array(torch.zeros(2, dtype=torch.bfloat16))


def test_a_variance_is_never_negative():
    layout = ModelLayout.of(
        {"bn.running_var": np.zeros(3, np.float32), "bn.running_mean": np.zeros(3, np.float32)}
    )
    model = layout.unflatten(np.array([-1e-6, 0.0, 2.0, -1e-6, 0.0, 2.0]))
    assert model["bn.running_var"].tolist() == [0.0, 0.0, 2.0]
    assert model["bn.running_mean"][0] < 0


def test_a_network_with_batch_norm_and_tied_weights_averages_as_stated():
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.encode = torch.nn.Linear(4, 4)
            self.norm = torch.nn.BatchNorm1d(4)
            self.halved = torch.nn.Parameter(torch.randn(3).half())
            self.empty = torch.nn.Parameter(torch.zeros(0, 2))
            self.decode = torch.nn.Linear(4, 4)
            self.decode.weight = self.encode.weight  # tied

    def state(net: Net) -> dict[str, np.ndarray]:
        return {name: value.detach().numpy().copy() for name, value in net.state_dict().items()}

    first = state(Net(0))
    layout = ModelLayout.of(first)
    sites = []
    for seed, examples in ((1, 10), (2, 30)):
        net = Net(seed)
        for _ in range(seed):
            net.norm(torch.randn(8, 4) * seed)
        sites.append((state(net), examples))
    total = sum(weighted_vector(layout.flatten(model), n, 100, 64.0) for model, n in sites)
    mean = layout.unflatten(average(total))
    assert [int(model["norm.num_batches_tracked"]) for model, _ in sites] == [1, 2]
    assert int(mean["norm.num_batches_tracked"]) == 0  # the first model's
    for name in ("norm.running_mean", "norm.running_var", "encode.bias", "halved"):
        expected = np.average([model[name].astype(float) for model, _ in sites], axis=0, weights=[10, 30])
        assert mean[name].dtype == first[name].dtype
        assert np.allclose(mean[name], expected, atol=1e-3 if name == "halved" else 1e-6)
    assert mean["empty"].shape == (0, 2)
    assert np.array_equal(mean["encode.weight"], mean["decode.weight"])
    net = Net(3)
    net.load_state_dict({name: torch.from_numpy(value) for name, value in mean.items()})
    assert net.decode.weight is net.encode.weight
    assert np.array_equal(state(net)["encode.weight"], mean["decode.weight"])


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
        '[["w",[1],"float32"],["a",[2],"int8",[1]]]',
        '[["w",[1],"float32"],["a",[1],"int8",[128]]]',
        '[["w",[1],"float32"],["a",[1],"bool",[true]]]',
        '[["w",[1],"float32"],["a",[1],"uint8",[1.0]]]',
        '[["w",[1],"float32",[1]]]',
        '[["a",[],"int64",[1]]]',
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

from __future__ import annotations

import dataclasses

import pytest

from flep_fl.contracts.errors import CipherParameterError
from flep_fl.data_security.keys import CipherParameters, NoiseParameters


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", ("scramble", "blur")),
        ("layers", ("mask", "mask")),
        ("layers", "mask"),
        ("block_side", 0),
        ("block_side", 33),
        ("block_side", 2.0),
        ("block_side", True),
        ("wavelet", "nosuch"),
        ("wavelet", "cmor"),
        ("wavelet", "bior9.9"),
        ("wavelet", 3),
        ("alpha", 0),
        ("alpha", -0.5),
        ("alpha", 1.0001),
        ("alpha", float("nan")),
        ("alpha", "0.5"),
        ("bits", 9),
        ("bits", 1),
        ("bits", 24),
        ("bits", [8, 6, 6]),
        ("bits", [8, 6, 6, 5.0]),
        ("bits", "8"),
        ("alpha", [0.5, 0.5]),
        ("alpha", [0.5, 0.5, 0.5, 0]),
        ("alpha", [0.5, 0.5, 0.5, None]),
        ("bits", 8.0),
        ("noise_units", "volts"),
    ],
)
def test_cipher_field_out_of_range_is_named(field: str, value: object) -> None:
    with pytest.raises(CipherParameterError, match=rf"cipher\.{field}"):
        CipherParameters(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("family", "cauchy"),
        ("std", -1),
        ("std", 256),
        ("std", float("inf")),
        ("mean", 300),
        ("mean", None),
        ("recovery", "none"),
        ("gain", 0),
        ("gain", "1"),
        ("amount", 1.5),
        ("salt", -0.1),
    ],
)
def test_noise_field_out_of_range_is_named(field: str, value: object) -> None:
    with pytest.raises(CipherParameterError, match=rf"noise\.{field}"):
        NoiseParameters(**{field: value})


def test_layers_are_kept_in_order_of_application() -> None:
    assert CipherParameters(layers=["envelope", "scramble"]).layers == ("scramble", "envelope")


def test_parameters_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CipherParameters().alpha = 1.0  # type: ignore[misc]

"""The estimate of an unknown noise level."""

from __future__ import annotations

import numpy as np
import pytest
from skimage import data as samples

from flep_fl.contracts.errors import ImageFormatError
from flep_fl.data_security.denoise.estimate import estimate_std


@pytest.mark.parametrize("std", [5, 10, 25, 50])
def test_pure_noise(std):
    noise = np.random.default_rng(0).standard_normal((256, 256)) * std + 100
    assert estimate_std(noise) == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize(("std", "error"), [(10, 0.15), (25, 0.05), (50, 0.03)])
@pytest.mark.parametrize("name", ["camera", "coins", "moon"])
def test_photographs(name, std, error):
    image = getattr(samples, name)()
    noisy = image + np.random.default_rng(1).standard_normal(image.shape) * std
    assert estimate_std(noisy) == pytest.approx(std, rel=error)


def test_no_noise_at_all():
    assert estimate_std(np.full((32, 32), 7.0)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("shape", [(15, 40), (40, 15), (2, 40, 40), (40,)])
def test_other_shapes_are_named(shape):
    with pytest.raises(ImageFormatError, match="cannot be estimated"):
        estimate_std(np.zeros(shape))

"""The denoiser for the noise that a key bundle states: which transform, and which network."""

from __future__ import annotations

from flep_fl.contracts.ports import Denoise
from flep_fl.data_security.denoise.zoo import has_network, identity, load_denoiser
from flep_fl.data_security.restoring import ResidualNoise

_INPAINTING = (25.0, 15.0, 15.0, 8.0, 4.0)
"""Levels of the passes that fill what salt and pepper hit."""


def denoiser_for(
    name: str, noise: ResidualNoise, *, threads: int | None = None, device: str = "auto"
) -> Denoise:
    """Choose the denoiser for the noise that is left in decrypted images.

    - ``gaussian``, and families that are not known here: the network ``name`` at the standard deviation.
    - ``poisson_gaussian``, ``rician``: the same network between a variance-stabilising transform and its
      exact unbiased inverse (:mod:`flep_fl.data_security.denoise.stabilise`).
    - ``laplacian``, ``rayleigh``: a network of the family's own, on half-size images and told the level,
      whichever of ``dncnn9`` and ``fast`` is named. ``blind`` stays the blind Gaussian network.
    - ``salt_and_pepper``: hit pixels are found and filled (:mod:`flep_fl.data_security.denoise.impulses`)
      with the help of the fast network.

    Parameters
    ----------
    name
        ``dncnn9``, ``fast``, ``blind`` or ``none``.
    noise
        As :func:`flep_fl.data_security.restoring.residual_noise` gives it.
    threads, device
        As for :func:`~flep_fl.data_security.denoise.zoo.load_denoiser`.

    Returns
    -------
    Denoise
        ``(N, H, W)`` float32, 0..255 scale, to the same, not clipped.

    Raises
    ------
    ConfigError, DenoiserError
        As :func:`~flep_fl.data_security.denoise.zoo.load_denoiser`; the level is that of the network, which
        after a transform is another one than ``noise.std``.
    """
    if name == "none":
        return identity

    def load(network: str, std: float, family: str = "gaussian") -> Denoise:
        return load_denoiser(network, std, family=family, threads=threads, device=device)

    if noise.family == "salt_and_pepper":
        from flep_fl.data_security.denoise.impulses import impulse_denoiser

        steps = [load("fast", level) for level in _INPAINTING] if noise.amount else []
        return impulse_denoiser(noise.amount, steps)
    if noise.family in {"laplacian", "rayleigh"} and name != "blind" and has_network("fast", noise.family):
        return load("fast", noise.std, noise.family)
    if noise.family == "poisson_gaussian" or (noise.family == "rician" and noise.std > 0):
        from flep_fl.data_security.denoise.stabilise import anscombe, rician

        poisson = noise.family == "poisson_gaussian"
        stabiliser = anscombe(noise.gain, noise.std) if poisson else rician(noise.std)
        return stabiliser.around(load(name, stabiliser.level))
    return load(name, noise.std)

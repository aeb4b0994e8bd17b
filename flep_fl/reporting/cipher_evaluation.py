"""Measures an image cipher: its cipher images, what each layer adds, keys, time, restoration."""

from __future__ import annotations

import math
import secrets
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.errors import ConfigError, WrongImageKeyError
from flep_fl.contracts.ports import Denoise
from flep_fl.data_security import metrics
from flep_fl.data_security.envelope import NONCE_BYTES, TAG_BYTES
from flep_fl.data_security.keys import ImageKeyBundle
from flep_fl.data_security.limits import LEVEL, limits
from flep_fl.data_security.parameters import CipherParameters, NoiseParameters
from flep_fl.data_security.pipeline import RestoreOrder, ThreeLayerCipher, restore

GreyImage = NDArray[np.uint8]
"""uint8, shape (H, W), 0..255."""

Result = TypeVar("Result")

TESTS = ("npcr", "uaci", "chi2", "entropy", "local_entropy", "corr_h", "corr_v", "corr_d")
"""Statistics that have an acceptance interval."""

TIMING_RUNS = 5
LAYER_KEYS = 10
"""Keys per layer at most: a layer's table tells what it adds, not how often it passes."""

KEY_PAIRS = 10
"""Pairs of keys one bit apart, per image."""

MAX_KEYS = 100_000
_CORRELATIONS = ("corr_h", "corr_v", "corr_d")


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics of one cipher image, at one byte per pixel.

    Attributes
    ----------
    npcr, uaci
        Percent, against the cipher image of a plaintext that differs in one pixel (same key, same nonce).
    entropy, local_entropy
        Bits.
    encryption_quality
        Mean change of the histogram against the plaintext's; NaN where the sizes differ.
    chi2
        Histogram against the uniform one.
    corr_h, corr_v, corr_d
        Correlation of all adjacent pairs: horizontal, vertical, diagonal.
    """

    npcr: float
    uaci: float
    entropy: float
    local_entropy: float
    encryption_quality: float
    chi2: float
    corr_h: float
    corr_v: float
    corr_d: float


STATISTICS = tuple(field.name for field in fields(Statistics))


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured: parameters, from which every key draws a fresh cipher.

    Attributes
    ----------
    parameters, noise
        Of the bundles.
    sealed
        Whether the statistics are those of the envelope's sealed bytes rather than of the wire image before
        the envelope; sensible where the envelope is the only layer.
    """

    parameters: CipherParameters
    noise: NoiseParameters
    sealed: bool = False

    def draw(self) -> ThreeLayerCipher:
        """Return a cipher under a fresh key bundle and a fresh noise secret."""
        bundle = ImageKeyBundle.generate(self.parameters, self.noise)
        return ThreeLayerCipher(bundle, noise_secret=secrets.token_bytes(32))

    def cipher_images(
        self, cipher: ThreeLayerCipher, images: NDArray[np.uint8], nonce: bytes | None = None
    ) -> list[GreyImage]:
        """Encrypt images (N, H, W) under *one* nonce; return the bytes that are measured, as uint8 (H', W').

        At 8 bits these are the coefficients in their places. At other bits they are the packed bytes, folded
        into rows as long as the wire image's (what does not fill the last row is left out).
        """
        nonces = [secrets.token_bytes(NONCE_BYTES) if nonce is None else nonce] * len(images)
        if self.sealed:
            sizes = [data.size for data in cipher.wire_bytes(images, nonces=nonces)]
            sealed = zip(cipher._encrypt_with(images, nonces), sizes, strict=True)
            data = [np.frombuffer(body[-TAG_BYTES - size : -TAG_BYTES], np.uint8) for body, size in sealed]
        elif set(self.parameters.band_bits) == {8}:
            return list(cipher.wire_images(images, nonces=nonces).astype(np.uint8, copy=False))
        else:
            data = list(cipher.wire_bytes(images, nonces=nonces))
        columns = images.shape[2]
        return [row[: row.size // columns * columns].reshape(-1, columns) for row in data]


def subject_of(parameters: CipherParameters, noise: NoiseParameters) -> Subject:
    """Return what to measure: the wire image, or the sealed bytes of a cipher that is an envelope alone."""
    return Subject(parameters, noise, sealed=parameters.layers == ("envelope",))


def measure(
    plain: GreyImage, cipher_image: GreyImage, neighbour: GreyImage, rng: np.random.Generator
) -> Statistics:
    """Compute the statistics of one cipher image.

    Parameters
    ----------
    plain
        The plaintext, uint8 (H, W).
    cipher_image, neighbour
        Cipher images of the plaintext and of one that differs in one pixel, uint8 (H', W').
    rng
        Chooses the blocks of the local entropy.
    """
    same_size = cipher_image.size == plain.size
    return Statistics(
        npcr=metrics.npcr(cipher_image, neighbour),
        uaci=metrics.uaci(cipher_image, neighbour),
        entropy=metrics.entropy(cipher_image),
        local_entropy=metrics.local_entropy(cipher_image, rng),
        encryption_quality=metrics.encryption_quality(plain, cipher_image) if same_size else math.nan,
        chi2=metrics.chi_square(cipher_image),
        corr_h=metrics.adjacent_correlation(cipher_image, "horizontal"),
        corr_v=metrics.adjacent_correlation(cipher_image, "vertical"),
        corr_d=metrics.adjacent_correlation(cipher_image, "diagonal"),
    )


def passes(values: Statistics, pixels: int, level: float = LEVEL) -> dict[str, bool]:
    """Say which statistics lie inside their acceptance intervals for ``pixels`` bytes."""
    bounds = limits(pixels, level)
    intervals = {
        **{name: getattr(bounds, name) for name in ("npcr", "uaci", "chi2", "entropy", "local_entropy")},
        **dict.fromkeys(_CORRELATIONS, bounds.correlation),
    }
    return {name: getattr(values, name) in intervals[name] for name in TESTS}


def with_one_pixel_changed(image: GreyImage, rng: np.random.Generator) -> GreyImage:
    """Return a copy in which one random pixel differs by one grey level."""
    changed = image.copy()
    row, column = (int(rng.integers(side)) for side in image.shape)
    changed[row, column] ^= 1
    return changed


def evaluate(
    images: Mapping[str, GreyImage],
    subject: Subject,
    *,
    keys: int,
    denoise: Denoise | None = None,
    order: RestoreOrder = "restore_first",
    level: float = LEVEL,
    rng: np.random.Generator | None = None,
    on_event: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """Measure a cipher on images under random keys.

    Parameters
    ----------
    images
        uint8 (H, W) by name, at least 256 pixels each; sizes may differ.
    subject
        The cipher.
    keys
        Number of random key bundles, 1..100,000.
    denoise, order
        How images are restored.
    level
        Significance level of the tests.
    rng
        Chooses pixels and blocks, never keys.
    on_event
        Gets one line of progress at a time.

    Returns
    -------
    dict
        JSON-ready: ``images``, ``plain``, ``layers``, ``cumulative``, ``pass_rate``, ``keys``, ``limits``.
        A statistic of ``images.<name>`` is the mean over the keys, but a correlation is the one farthest
        from zero. None stands for infinite (PSNR of an exact restoration) and for undefined.

    Raises
    ------
    ConfigError
        ``keys`` is out of range.
    ImageFormatError
        An image is too small for statistics.
    """
    if not 1 <= keys <= MAX_KEYS:
        raise ConfigError(f"keys={keys} is out of range", expected=f"1..{MAX_KEYS}", remedy="Set keys=200")
    for image in images.values():
        limits(image.size, level)
    rng = np.random.default_rng() if rng is None else rng
    runs = statistics_under_keys(images, subject, keys=keys, rng=rng)
    on_event(f"{keys} keys on {len(images)} images")
    report: dict[str, Any] = {"images": {}, "plain": {}}
    for name, image in images.items():
        sizes = _measured_pixels(subject, image)
        summary = summarise(runs[name])
        summary["pass_rate"] = _pass_rates([(run, sizes) for run in runs[name]], level)
        summary["key_sensitivity"] = key_sensitivity(image, subject)
        summary.update(timing_and_quality(image, subject, denoise, order))
        report["images"][name] = summary
        report["plain"][name] = plain_statistics(image, rng)
        on_event(f"{name}: entropy {summary['entropy']:.4f}, encrypted in {summary['encrypt_ms']:.2f} ms")
    report["layers"], report["cumulative"] = layer_tables(
        images, subject, keys=min(keys, LAYER_KEYS), rng=rng, on_event=on_event
    )
    pooled = [(run, _measured_pixels(subject, images[name])) for name in images for run in runs[name]]
    report["pass_rate"] = _pass_rates(pooled, level)
    means = [float(np.mean([runs[name][key].entropy for name in images])) for key in range(keys)]
    report["keys"] = {"count": keys, "mean_entropy": means, "min_mean_entropy": min(means)}
    report["limits"] = {
        name: limits_entry(_measured_pixels(subject, image), level) for name, image in images.items()
    }
    finite: dict[str, Any] = _without_infinities(report)
    return finite


def statistics_under_keys(
    images: Mapping[str, GreyImage], subject: Subject, *, keys: int, rng: np.random.Generator
) -> dict[str, list[Statistics]]:
    """Measure every image under ``keys`` fresh keys; one list of ``keys`` statistics an image."""
    runs: dict[str, list[Statistics]] = {name: [] for name in images}
    for _ in range(keys):
        cipher = subject.draw()
        for name, image in images.items():
            pair = np.stack([image, with_one_pixel_changed(image, rng)])
            first, second = subject.cipher_images(cipher, pair)
            runs[name].append(measure(image, first, second, rng))
    return runs


def summarise(runs: Sequence[Statistics]) -> dict[str, Any]:
    """Return means over the runs; of correlations the one farthest from zero; and the lowest entropy."""
    summary: dict[str, Any] = {
        name: float(np.mean([getattr(run, name) for run in runs])) for name in STATISTICS
    }
    for name in _CORRELATIONS:
        summary[name] = max((getattr(run, name) for run in runs), key=abs)
    summary["min_entropy"] = min(run.entropy for run in runs)
    return summary


def plain_statistics(image: GreyImage, rng: np.random.Generator) -> dict[str, float]:
    """Return the statistics of a plaintext that make sense for one."""
    values = measure(image, image, image, rng)
    return {
        name: getattr(values, name)
        for name in STATISTICS
        if name not in ("npcr", "uaci", "encryption_quality")
    }


def key_sensitivity(image: GreyImage, subject: Subject) -> dict[str, Any]:
    """Encrypt under keys that differ in one bit, and decrypt under the wrong one.

    Returns
    -------
    dict
        ``npcr`` and ``uaci`` (percent) between the two cipher images (same image, same nonce), means over
        ten pairs of keys; ``wrong_key_refused``: whether the other key refuses the envelope.
    """
    values: list[tuple[float, float]] = []
    refused = True
    for pair in range(KEY_PAIRS):
        noise_secret, nonce = secrets.token_bytes(32), secrets.token_bytes(NONCE_BYTES)
        bundle = ImageKeyBundle.generate(subject.parameters, subject.noise)
        key = bytearray(bundle.master_key)
        key[pair % len(key)] ^= 1 << (pair % 8)
        cipher, other = (
            ThreeLayerCipher(bundle, noise_secret=noise_secret)
            for bundle in (bundle, replace(bundle, master_key=bytes(key)))
        )
        images = [subject.cipher_images(c, image[None], nonce)[0] for c in (cipher, other)]
        values.append((metrics.npcr(*images), metrics.uaci(*images)))
        refused = refused and _refuses(other, cipher.encrypt(image[None]))
    npcr, uaci = (float(np.mean([value[i] for value in values])) for i in range(2))
    return {"npcr": npcr, "uaci": uaci, "wrong_key_refused": refused}


def timing_and_quality(
    image: GreyImage, subject: Subject, denoise: Denoise | None, order: RestoreOrder
) -> dict[str, float]:
    """Time one image at a time and measure its restoration.

    Returns
    -------
    dict
        ``encrypt_ms``, ``decrypt_ms`` (medians of five, without denoiser), ``denoise_ms`` (one run; 0 without
        a denoiser), ``total_ms``, ``psnr_db`` (restored) and ``noisy_psnr_db`` (decrypted only).
    """
    cipher = subject.draw()
    batch = image[None]
    encrypt_ms, envelopes = _timed(lambda: cipher.encrypt(batch))
    decrypt_ms, decrypted = _timed(lambda: restore(cipher, envelopes))
    noisy = metrics.psnr(image, decrypted[0])
    denoise_ms, restored = 0.0, noisy
    if denoise is not None:
        whole_ms, images = _timed(lambda: restore(cipher, envelopes, denoise, order), runs=1)
        denoise_ms, restored = max(0.0, whole_ms - decrypt_ms), metrics.psnr(image, images[0])
    return {
        "encrypt_ms": encrypt_ms,
        "decrypt_ms": decrypt_ms,
        "denoise_ms": denoise_ms,
        "total_ms": encrypt_ms + decrypt_ms + denoise_ms,
        "psnr_db": restored,
        "noisy_psnr_db": noisy,
    }


def layer_tables(
    images: Mapping[str, GreyImage],
    subject: Subject,
    *,
    keys: int,
    rng: np.random.Generator,
    on_event: Callable[[str], None] = lambda _line: None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure each layer alone, and the layers up to and including it; means over images and keys."""
    alone: dict[str, Any] = {}
    up_to: dict[str, Any] = {}
    for layer, single, sum_of_layers in layer_subjects(subject):
        alone[layer] = _layer_entry(images, single, keys, rng)
        up_to[layer] = _layer_entry(images, sum_of_layers, keys, rng)
        on_event(f"layer {layer}: entropy {alone[layer]['entropy']:.4f} alone")
    return alone, up_to


def layer_subjects(subject: Subject) -> list[tuple[str, Subject, Subject]]:
    """Return each layer's name, that layer alone, and all layers up to it."""
    layers = subject.parameters.layers
    return [
        (
            layer,
            _with_layers(subject, (layer,)),
            _with_layers(subject, layers[: index + 1]),
        )
        for index, layer in enumerate(layers)
    ]


def _with_layers(subject: Subject, layers: tuple[str, ...]) -> Subject:
    parameters = subject.parameters
    if "encode" not in layers:
        # One plane instead of four sub-bands: no byte of it may be narrower than a pixel.
        bits = 8 if max(parameters.band_bits) <= 8 else max(parameters.band_bits)
        parameters = replace(parameters, bits=bits)
    parameters = replace(parameters, layers=layers)
    return Subject(parameters, subject.noise, sealed=layers[-1] == "envelope")


def _layer_entry(
    images: Mapping[str, GreyImage], subject: Subject, keys: int, rng: np.random.Generator
) -> dict[str, Any]:
    runs = statistics_under_keys(images, subject, keys=keys, rng=rng)
    entry = summarise([run for image_runs in runs.values() for run in image_runs])
    timed = [timing_and_quality(image, subject, None, "restore_first") for image in images.values()]
    for name in ("encrypt_ms", "decrypt_ms", "psnr_db"):
        entry[name] = float(np.mean([values[name] for values in timed]))
    return entry


def limits_entry(pixels: int, level: float) -> dict[str, Any]:
    """Return the acceptance intervals of one image size as ``[low, high]`` pairs, None for infinite."""
    bounds = limits(pixels, level)
    pairs = {field.name: getattr(bounds, field.name) for field in fields(bounds)}
    return {"pixels": pixels, **{name: [pair.low, pair.high] for name, pair in pairs.items()}}


def _pass_rates(runs: Sequence[tuple[Statistics, int]], level: float) -> dict[str, float]:
    verdicts = [passes(run, pixels, level) for run, pixels in runs]
    return {name: float(np.mean([verdict[name] for verdict in verdicts])) for name in TESTS}


def _measured_pixels(subject: Subject, image: GreyImage) -> int:
    return subject.cipher_images(subject.draw(), image[None])[0].size


def _refuses(cipher: ThreeLayerCipher, envelopes: Sequence[bytes]) -> bool:
    try:
        cipher.decrypt(envelopes)
    except WrongImageKeyError:
        return True
    return False


def _timed(function: Callable[[], Result], runs: int = TIMING_RUNS) -> tuple[float, Result]:
    """Return the median time in ms of ``runs`` calls, and the last result."""
    if runs > 1:
        function()
    seconds: list[float] = []
    for _ in range(runs):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds), result


def _without_infinities(value: Any) -> Any:
    """Replace NaN and infinities by None: JSON has no word for them."""
    if isinstance(value, dict):
        return {name: _without_infinities(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_without_infinities(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

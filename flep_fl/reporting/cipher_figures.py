"""Pictures of a cipher at work, in the manner of the paper's Fig. 4."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.errors import MissingExtraError
from flep_fl.contracts.files import write_atomic
from flep_fl.contracts.ports import Denoise
from flep_fl.data_security.metrics import LEVELS, histogram
from flep_fl.data_security.pipeline import RestoreOrder, restore
from flep_fl.reporting.cipher_evaluation import Subject, layer_subjects

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GreyImage = NDArray[np.uint8]
"""uint8, shape (H, W), 0..255."""

DPI = 110
MAX_ROWS = 6
"""Images shown per layer."""

_PANEL = 2.6


def require_plotting(without: str) -> None:
    """Refuse to go on without matplotlib, before hours have gone into measuring.

    Parameters
    ----------
    without
        The setting that does without, for the error.

    Raises
    ------
    MissingExtraError
        Naming the extra that brings it.
    """
    _figure_class(without)


def draw_cipher_figures(
    folder: Path,
    images: Mapping[str, GreyImage],
    subject: Subject,
    *,
    denoise: Denoise | None = None,
    order: RestoreOrder = "restore_first",
) -> list[Path]:
    """Draw one PNG per image and one per layer.

    Parameters
    ----------
    folder
        Gets ``image_<name>.png`` (original, encrypted, decrypted, each above its histogram) and
        ``layer_<layer>.png`` (a row per image, six at most: original, after the layer alone, after all
        layers up to it).
    images
        uint8 (H, W) by name.
    subject
        The cipher.
    denoise, order
        How images are restored.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    MissingExtraError
        matplotlib is not installed.
    """
    written: list[Path] = []
    for name, image in images.items():
        path = folder / f"{_file_name(name)}.png"
        written.append(draw_figure(path, name, image, subject, denoise=denoise, order=order))
    for layer, alone, up_to in layer_subjects(subject):
        rows = [
            [
                (name, image),
                (f"{layer} alone", alone.cipher_images(alone.draw(), image[None])[0]),
                (f"up to {layer}", up_to.cipher_images(up_to.draw(), image[None])[0]),
            ]
            for name, image in list(images.items())[:MAX_ROWS]
        ]
        written.append(_save(_rows(layer, rows), folder / f"layer_{layer}.png"))
    return written


def draw_figure(
    path: Path,
    title: str,
    image: GreyImage,
    subject: Subject,
    *,
    denoise: Denoise | None = None,
    order: RestoreOrder = "restore_first",
) -> Path:
    """Draw one PNG of one image: original, encrypted, decrypted, each above its histogram.

    Raises
    ------
    MissingExtraError
        matplotlib is not installed.
    """
    cipher = subject.draw()
    encrypted = subject.cipher_images(cipher, image[None])[0]
    decrypted = restore(cipher, cipher.encrypt(image[None]), denoise, order)[0].astype(np.uint8)
    panels = [("original", image), ("encrypted", encrypted), ("decrypted", decrypted)]
    return _save(_with_histograms(title, panels), path)


def draw_layers(path: Path, image: GreyImage, subject: Subject) -> Path:
    """Draw one PNG with all layers of a cipher on one image: a row per layer, alone and upon those before.

    Raises
    ------
    MissingExtraError
        matplotlib is not installed.
    """
    rows = [
        [
            (f"{layer} alone", alone.cipher_images(alone.draw(), image[None])[0]),
            (f"up to {layer}", up_to.cipher_images(up_to.draw(), image[None])[0]),
        ]
        for layer, alone, up_to in layer_subjects(subject)
    ]
    return _save(_rows("layer by layer", rows), path)


def _with_histograms(title: str, panels: Sequence[tuple[str, GreyImage]]) -> Figure:
    figure = _figure_class()(figsize=(_PANEL * len(panels), 1.75 * _PANEL), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, len(panels), squeeze=False, height_ratios=(3, 2))
    for column, (label, image) in enumerate(panels):
        _show(axes[0, column], label, image)
        _show_histogram(axes[1, column], image)
    return figure


def _rows(title: str, rows: Sequence[Sequence[tuple[str, GreyImage]]]) -> Figure:
    columns = len(rows[0])
    figure = _figure_class()(figsize=(_PANEL * 2 * columns, _PANEL * len(rows) + 0.4), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(rows), 2 * columns, squeeze=False)
    for row, panels in enumerate(rows):
        for column, (label, image) in enumerate(panels):
            _show(axes[row, 2 * column], label, image)
            _show_histogram(axes[row, 2 * column + 1], image)
    return figure


def _show(axis: Axes, label: str, image: GreyImage) -> None:
    axis.imshow(image, cmap="gray", vmin=0, vmax=LEVELS - 1, interpolation="nearest")
    axis.set_title(label, fontsize="small")
    axis.set_axis_off()


def _show_histogram(axis: Axes, image: GreyImage) -> None:
    axis.fill_between(np.arange(LEVELS), histogram(image), step="mid", linewidth=0)
    axis.set_xlim(0, LEVELS - 1)
    axis.set_ylim(bottom=0)
    axis.tick_params(labelsize="xx-small")


def _save(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    write_atomic(path, buffer.getvalue())
    return path


def _file_name(name: str) -> str:
    """Keep letters, digits, dots, dashes and underscores: a picture's name may be any file's."""
    kept = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
    return f"image_{kept}"


def _figure_class(without: str = "figures=false") -> type[Figure]:
    try:
        # The class, not pyplot: no global state, no display.
        from matplotlib.figure import Figure as FigureClass
    except ImportError as exc:
        raise MissingExtraError(
            "Figures need matplotlib, which is not installed",
            remedy=f"Run: pip install -e '.[plot]', or set {without}",
        ) from exc
    return FigureClass

"""The pictures in ``docs/figures``: ``python -m benchmarks.figures``.

The cipher on scikit-image's ``camera`` (CC0), 256 x 256, at one byte a coefficient and with Gaussian noise of
25 grey levels: original, encrypted and decrypted with their histograms, and what each layer does. Keys are
random, so the bytes differ from run to run. Needs the extras ``samples`` and ``plot``.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from flep_fl.contracts.errors import FlepError
from flep_fl.contracts.files import write_atomic
from flep_fl.data_security.denoise.zoo import load_denoiser
from flep_fl.data_security.parameters import NoiseParameters
from flep_fl.data_security.presets import get_preset
from flep_fl.reporting.cipher_evaluation import subject_of
from flep_fl.reporting.cipher_figures import draw_figure, draw_layers
from flep_fl.reporting.sample_images import named_images

NAME = "camera"
COLOURS = 32
WIDTH = 860


def shrink(source: Path, target: Path) -> None:
    """Reduce a PNG to a page's width and a small palette; noise does not compress."""
    with Image.open(source) as opened:
        picture = opened.convert("RGB")
    if picture.width > WIDTH:
        height = round(picture.height * WIDTH / picture.width)
        picture = picture.resize((WIDTH, height), Image.Resampling.BOX)
    buffer = io.BytesIO()
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, buffer.getvalue())
    print(f"{target}: {len(buffer.getvalue()) / 1000:.0f} kB")


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw both pictures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("docs/figures"), help="folder (default docs/figures)"
    )
    options = parser.parse_args(arguments)
    try:
        image = named_images(None)[NAME]
        subject = subject_of(replace(get_preset("flep").parameters, bits=8), NoiseParameters(std=25.0))
        denoise = load_denoiser("dncnn9", subject.draw().residual_std, threads=1)
        with tempfile.TemporaryDirectory() as folder:
            figure = draw_figure(Path(folder) / "cipher.png", NAME, image, subject, denoise=denoise)
            layers = draw_layers(Path(folder) / "layers.png", image, subject)
            shrink(figure, options.out / "cipher.png")
            shrink(layers, options.out / "cipher_layers.png")
    except FlepError as error:
        print(f"error ({type(error).__name__}): {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

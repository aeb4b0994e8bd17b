"""What the noise costs the classifier: ``python -m benchmarks.utility --data elpv --out FOLDER``.

The same classifier, from the same seeds, is trained and tested on images that came

- ``plain``: as they are,
- ``decrypted``: through the cipher with noise that only the owner knows, not denoised,
- ``denoised``: the same, denoised as an analyst does,
- ``keyed``: through the cipher with noise that the key takes off again.

Images are sealed at their ``native`` size and reduced after restoring, or sealed at the size of the
classifier's input (``reduced``). One *cell* is one arm, level, size and seed; a seed decides the split (one
fifth is held out), the first weights and the order of training. Every finished cell is a line of
``OUT/cells.jsonl``: a run that was stopped goes on where it was, and restored images are kept, reduced, in
``OUT/images``. With ``--report`` nothing is computed: the table is printed, and with ``--plot FILE`` drawn.
Differences to ``plain`` are paired by seed, with a 95 % interval of Student's t.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.errors import FlepError
from flep_fl.contracts.files import write_atomic
from flep_fl.data_analyst.restore import reduce_area
from flep_fl.data_owner.partition import split_test
from flep_fl.data_owner.sources import OwnerImages, load_source, resize_native
from flep_fl.data_security.denoise.zoo import load_denoiser
from flep_fl.data_security.keys import ImageKeyBundle
from flep_fl.data_security.parameters import NoiseParameters
from flep_fl.data_security.pipeline import ThreeLayerCipher
from flep_fl.data_security.presets import get_preset
from flep_fl.data_security.restoring import decrypt_images
from flep_fl.reporting.cipher_tables import markdown

ARMS = ("plain", "denoised", "decrypted", "keyed")
SIZES = ("native", "reduced")
_T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t at 97.5 %, by number of seeds."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What all cells of one table share."""

    data: str
    images: int
    limit: int | None
    side: int
    epochs: int
    lr: float
    batch_size: int
    denoiser: str


@dataclass(frozen=True, slots=True)
class Cell:
    """One training: ``sigma`` is 0 for the arms on which no noise is left."""

    arm: str
    size: str
    sigma: float
    seed: int


def cells(sigmas: Sequence[float], sizes: Sequence[str], seeds: int) -> Iterator[Cell]:
    """Yield all cells; the middle level at native size comes first, and every comparison is whole early.

    Keyed noise leaves nothing behind, so that arm stands once a size. Plain images are reduced once in any
    case, so that arm stands once.
    """
    ordered = sorted(sigmas, key=lambda sigma: (sigma != 25, -sigma))
    for size in sizes:
        for index, sigma in enumerate(ordered):
            for seed in range(seeds):
                if index == 0 and size == sizes[0]:
                    yield Cell("plain", SIZES[0], 0.0, seed)
                yield Cell("denoised", size, sigma, seed)
            yield from (Cell("decrypted", size, sigma, seed) for seed in range(seeds))
            if index == 0:
                yield from (Cell("keyed", size, 0.0, seed) for seed in range(seeds))


def restored(source: OwnerImages, setting: Setting, arm: str, size: str, sigma: float) -> NDArray[np.float32]:
    """Return the classifier's images of an arm, float32 (N, 1, side, side), 0..255 scale, clipped."""
    noise = NoiseParameters(std=sigma or 25.0, recovery="keyed" if arm == "keyed" else "denoise")
    cipher = ThreeLayerCipher(
        ImageKeyBundle.generate(get_preset("flep").parameters, noise), noise_secret=secrets.token_bytes(32)
    )
    denoise = load_denoiser(setting.denoiser, cipher.residual_std) if arm == "denoised" else None
    result = np.empty((len(source.images), 1, setting.side, setting.side), dtype=np.float32)
    for index in range(len(source.images)):
        image = np.asarray(source.images[index])
        if size == "reduced":
            image = resize_native(image, setting.side)
        if arm == "plain":
            clear = image.astype(np.float32)
        else:
            clear = decrypt_images(cipher, cipher.encrypt(image[None]), denoise=denoise)[0]
        result[index, 0] = reduce_area(clear, setting.side)
    return np.clip(result, 0.0, 255.0, out=result)


def cached(
    folder: Path, source: OwnerImages, setting: Setting, arm: str, size: str, sigma: float
) -> NDArray[np.float32]:
    """Return :func:`restored`, computed once for all seeds and all runs."""
    key = json.dumps([asdict(setting), arm, size, sigma], sort_keys=True)
    path = folder / f"{arm}_{size}_{sigma:g}_{hashlib.sha256(key.encode()).hexdigest()[:12]}.npy"
    if path.exists():
        images: NDArray[np.float32] = np.load(path)
        return images
    print(f"restoring {len(source.images)} images: {arm}, {size}, sigma {sigma:g}", flush=True)
    images = restored(source, setting, arm, size, sigma)
    buffer = io.BytesIO()
    np.save(buffer, images)
    write_atomic(path, buffer.getvalue())
    return images


def accuracy(
    images: NDArray[np.float32], labels: NDArray[np.int64], classes: int, setting: Setting, seed: int
) -> float:
    """Train the project's classifier on four fifths of the images, return its accuracy on the last fifth."""
    from flep_fl.data_analyst.model import build_model
    from flep_fl.data_analyst.train import evaluate, train_local

    train, test = split_test(labels, 0.2, seed)
    model = build_model("cnn", classes=classes, seed=seed)
    epochs = setting.epochs
    # Two calls: the second, shorter one with a tenth of the rate brings the weights to rest.
    for part, (count, rate) in enumerate(((epochs - epochs // 4, 1.0), (epochs // 4, 0.1))):
        if count:
            train_local(
                model,
                images[train],
                labels[train],
                optimizer="adam",
                lr=setting.lr * rate,
                batch_size=setting.batch_size,
                local_epochs=count,
                seed=2 * seed + part,
                augment=True,
            )
    return evaluate(model, images[test], labels[test]).accuracy


def read_cells(path: Path) -> list[dict[str, object]]:
    """Return the finished cells; a line that a kill cut short is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def compute(options: argparse.Namespace) -> None:
    """Compute the missing cells, for as long as ``--minutes`` allows."""
    source = load_source(options.data, path=options.path, limit=options.limit, seed=0)
    setting = Setting(
        data=source.name,
        images=len(source.images),
        limit=options.limit,
        side=options.side,
        epochs=options.epochs,
        lr=options.lr,
        batch_size=options.batch_size,
        denoiser=options.denoiser,
    )
    labels = np.array(source.labels, dtype=np.int64)
    record = options.out / "cells.jsonl"
    done = {
        (entry["arm"], entry["size"], entry["sigma"], entry["seed"])
        for entry in read_cells(record)
        if entry["setting"] == asdict(setting)
    }
    until = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    for cell in cells(options.sigmas, options.sizes, options.seeds):
        if cell.arm not in options.arms or (cell.arm, cell.size, cell.sigma, cell.seed) in done:
            continue
        if time.monotonic() > until:
            print("the time is over; the same command goes on", flush=True)
            return
        images = cached(options.out / "images", source, setting, cell.arm, cell.size, cell.sigma)
        started = time.monotonic()
        value = accuracy(images, labels, len(source.classes), setting, cell.seed)
        entry = {"setting": asdict(setting), **asdict(cell), "accuracy": value}
        with record.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(f"{cell}: {100 * value:.2f} % ({time.monotonic() - started:.0f} s)", flush=True)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; accuracies and differences in per cent."""

    data: str
    size: str
    sigma: float
    arm: str
    seeds: int
    mean: float
    difference: float | None
    half_width: float | None


def rows(entries: Sequence[dict[str, object]]) -> list[Row]:
    """Summarise the finished cells; differences are taken seed by seed."""
    groups: dict[tuple[str, str, float, str], dict[int, float]] = {}
    names: dict[str, str] = {}
    for entry in entries:
        setting = json.dumps(entry["setting"], sort_keys=True)
        names[setting] = entry["setting"]["data"]  # type: ignore[index]
        key = (setting, str(entry["size"]), float(entry["sigma"]), str(entry["arm"]))  # type: ignore[arg-type]
        groups.setdefault(key, {})[int(entry["seed"])] = 100 * float(entry["accuracy"])  # type: ignore[call-overload, arg-type]
    result = []
    order = {arm: index for index, arm in enumerate(ARMS)}
    for key in sorted(groups, key=lambda key: (key[0], key[3] != "plain", key[1:3], order[key[3]])):
        setting, size, sigma, arm = key
        values = groups[key]
        plain = groups.get((setting, SIZES[0], 0.0, "plain"), {})
        shared = sorted(values.keys() & plain.keys())
        difference, half = None, None
        if arm != "plain" and shared:
            gaps = np.array([values[seed] - plain[seed] for seed in shared])
            difference = float(gaps.mean())
            if len(gaps) in _T_95:
                half = float(_T_95[len(gaps)] * gaps.std(ddof=1) / np.sqrt(len(gaps)))
        mean = float(np.mean(list(values.values())))
        result.append(Row(names[setting], size, sigma, arm, len(values), mean, difference, half))
    return result


def table(found: Sequence[Row]) -> str:
    """Return the Markdown table."""
    lines = []
    for row in found:
        gap = "" if row.difference is None else f"{row.difference:+.2f}"
        if row.half_width is not None:
            gap += f" ± {row.half_width:.2f}"
        everywhere = row.arm == "plain"
        lines.append(
            [
                row.data,
                "any" if everywhere else row.size,
                "none" if everywhere else "any" if row.sigma == 0 else f"{row.sigma:g}",
                row.arm,
                str(row.seeds),
                f"{row.mean:.2f}",
                gap,
            ]
        )
    return markdown(
        ["data", "sealed at", "sigma", "arm", "seeds", "accuracy %", "against plain, points"], lines
    )


def draw(found: Sequence[Row], path: Path) -> None:
    """Draw the differences to plain, a panel a data set and size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = sorted({(row.data, row.size) for row in found if row.difference is not None})
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(1, max(1, len(panels)), sharex=True, sharey=True, squeeze=False)
    for axes, (data, size) in zip(places[0], panels, strict=False):
        for shift, arm in enumerate(("decrypted", "denoised")):
            points = [row for row in found if (row.data, row.size, row.arm) == (data, size, arm)]
            axes.errorbar(
                [row.sigma + 1.5 * shift for row in points],
                [row.difference or 0.0 for row in points],
                yerr=[row.half_width or 0.0 for row in points],
                marker="o",
                capsize=3,
                label=arm,
            )
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set(title=f"{data}, sealed at {size} size", xlabel="sigma", ylabel="accuracy - plain, points")
        axes.set_xlim(left=0)
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomic(path, buffer.getvalue())


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute cells, or print what is there."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="elpv", help="elpv, digits or folder")
    parser.add_argument("--path", type=Path, help="folder of class folders, with --data folder")
    parser.add_argument("--limit", type=int, help="use so many images, a stratified subset")
    parser.add_argument("--side", type=int, default=64, help="the classifier's input (default 64)")
    parser.add_argument("--sigmas", type=float, nargs="+", default=[10.0, 25.0, 50.0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--denoiser", default="dncnn9")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no cell after so long")
    parser.add_argument("--out", type=Path, required=True, help="folder of cells.jsonl and restored images")
    parser.add_argument("--report", action="store_true", help="only print the table")
    parser.add_argument("--plot", type=Path, help="with --report: draw it, PNG")
    options = parser.parse_args(arguments)
    try:
        if not options.report:
            compute(options)
        found = rows(read_cells(options.out / "cells.jsonl"))
        print(table(found))
        if options.plot is not None:
            draw(found, options.plot)
    except FlepError as error:
        print(f"error ({type(error).__name__}): {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

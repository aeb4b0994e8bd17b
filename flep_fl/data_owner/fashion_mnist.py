"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747; MIT licence): a local copy, or a download."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flep_fl.contracts.errors import DataError, EmptyDatasetError
from flep_fl.data_owner.idx import read_idx

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""Of the unpacked files: however they were compressed, the content is the same. The header counts."""

_LAYOUT = Path("FashionMNIST") / "raw"  # torchvision's
_REMEDY = (
    "Copy the four idx files (plain or .gz) into a folder and set data.path=FOLDER; Debian's package "
    "dataset-fashion-mnist has them in /usr/share/datasets/fashion-mnist. Or take data=digits"
)


def load_fashion_mnist(path: Path | None) -> tuple[NDArray[np.uint8], list[int]]:
    """Return all 70,000 images, those of the training set first.

    The owner draws its own held-out split, so the two sets are put together.

    Parameters
    ----------
    path
        A folder with the four IDX files, plain or gzipped, or one in which torchvision has put them; None
        looks in the user's cache, and lets torchvision download them into it once.

    Returns
    -------
    images : uint8 array, shape (70000, 28, 28)
    labels : list of int
        Positions in :data:`CLASSES`.

    Raises
    ------
    EmptyDatasetError
        A file is missing in ``path``.
    DataError
        The download failed, or a file is not the one that was published.
    ImageFormatError
        A file is damaged.
    """
    folder = _cached() if path is None else _holding(path)
    images: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for part in ("train", "t10k"):
        pixels = _verified(folder, f"{part}-images-idx3-ubyte")
        values = _verified(folder, f"{part}-labels-idx1-ubyte")
        if pixels.ndim != 3 or values.shape != pixels.shape[:1] or values.max(initial=0) >= len(CLASSES):
            raise DataError(
                f"images and labels in {folder} do not fit each other",
                found=f"{pixels.shape} and {values.shape}",
                remedy=_REMEDY,
            )
        images.append(pixels)
        labels.extend(int(value) for value in values)
    return np.concatenate(images), labels


def cache_folder() -> Path:
    """Return where a download is kept: ``flep-fl`` in ``XDG_CACHE_HOME``, or in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flep-fl"


def _holding(path: Path) -> Path:
    """Return ``path``, or torchvision's folder in it, whichever holds the files."""
    for folder in (path, path / _LAYOUT):
        if all(_find(folder, name) for name in SHA256):
            return folder
    missing = [name for name in SHA256 if not _find(path, name)]
    raise EmptyDatasetError(
        f"data=fashion_mnist lacks {', '.join(missing)} in data.path={path}", remedy=_REMEDY
    )


def _find(folder: Path, name: str) -> Path | None:
    return next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)


def _cached() -> Path:
    folder = cache_folder()
    if not all(_find(folder / _LAYOUT, name) for name in SHA256):
        _download(folder)
    return _holding(folder)


def _download(folder: Path) -> None:
    # Imported here: torchvision pulls in torch. It checks the MD5 of what it downloads; we check again.
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(folder), train=True, download=True)
    except (OSError, RuntimeError) as exc:  # RuntimeError: no mirror answered, or another MD5
        raise DataError(
            f"data=fashion_mnist could not be downloaded ({type(exc).__name__}: {exc})", remedy=_REMEDY
        ) from exc


def _verified(folder: Path, name: str) -> NDArray[np.uint8]:
    file = _find(folder, name)
    if file is None:  # pragma: no cover - whoever calls has looked
        raise EmptyDatasetError(f"data=fashion_mnist lacks {name} in {folder}", remedy=_REMEDY)
    values = read_idx(file)
    head = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes()
    found = hashlib.sha256(head)
    found.update(values.data)
    if found.hexdigest() != SHA256[name]:
        raise DataError(
            f"{file} is not the file that Fashion-MNIST was published with",
            expected=f"SHA-256 {SHA256[name]} (unpacked)",
            found=found.hexdigest(),
            remedy=_REMEDY + ". For images of your own use data=folder",
        )
    return values

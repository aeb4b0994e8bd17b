"""Where the owner's images come from: packaged data sets or a folder."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from flep_fl.contracts.errors import (
    ConfigError,
    EmptyDatasetError,
    ImageFormatError,
    MissingExtraError,
)
from flep_fl.contracts.owner_records import OwnerImage
from flep_fl.data_owner import fashion_mnist, synthetic
from flep_fl.data_owner.partition import stratified_subset

GreyImage = NDArray[np.uint8]
"""uint8, shape (H, W), 0..255."""

MODES = ("grey", "native")
"""What files are decoded to: 8-bit grey, or grey and colour of 8 bits and grey of 16 bits as they are."""

_EIGHT_BIT_MODES = frozenset(
    {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}
)
_GREY_MODES = frozenset({"1", "L", "LA"})
_SIXTEEN_BIT_MODES = frozenset({"I;16", "I;16B", "I;16L", "I;16N", "I"})
_DEFECT_PROBABILITY = 0.5
_ELPV_CLASSES = ("functional", "defective")

_PACKAGES = {
    "elpv": ("elpv_dataset.utils", "data=elpv", "demo"),
    "digits": ("sklearn.datasets", "data=digits", "digits"),
}
"""What a data set is imported from, the setting that asks for it, and the extra that brings it."""


@dataclass(frozen=True)
class OwnerImages:
    """Plain images with labels, as the owner holds them.

    Attributes
    ----------
    name
        Name of the data set.
    images
        uint8 or uint16, shape (H, W) or (3, H, W) each; a folder's are decoded on access.
    labels
        Class index of every image.
    classes
        Class names.
    """

    name: str
    images: Sequence[OwnerImage] = field(repr=False)
    labels: list[int] = field(repr=False)
    classes: tuple[str, ...]


Loader = Callable[[Path | None], OwnerImages]


def load_source(
    name: str,
    *,
    path: Path | None = None,
    image_size: int | None = None,
    limit: int | None = None,
    seed: int,
    mode: str = "grey",
) -> OwnerImages:
    """Load a data set.

    Parameters
    ----------
    name
        A key of :data:`SOURCES`: ``elpv``, ``digits``, ``fashion_mnist``, ``synthetic`` or ``folder``.
    path
        The folder of class subfolders, for ``folder``; a local copy, for ``fashion_mnist``.
    image_size
        Side in pixels to which every image is reduced (area average, so without aliasing), 1..16384;
        None keeps the native size.
    limit
        Number of images to keep, a stratified random subset; None (or more than there are) keeps all.
    seed
        Seed of the subset, >= 0.
    mode
        One of :data:`MODES`; only ``folder`` has other images than grey ones.

    Returns
    -------
    OwnerImages
        At least one image; only the chosen files of a folder are ever decoded.

    Raises
    ------
    ConfigError
        The name is unknown, or a setting is missing or out of range.
    MissingExtraError
        The data set's package is not installed.
    EmptyDatasetError
        The folder, or one of its class folders, holds no image; a file of a data set is missing.
    DataError
        A data set cannot be downloaded, or is not the published one.
    ImageFormatError
        A file does not decode to such pixels (raised on access for ``folder``).
    """
    if mode not in MODES:
        raise ConfigError("data.mode is unknown", expected="one of " + ", ".join(MODES), found=mode)
    if name not in SOURCES:
        raise ConfigError("data.name is unknown", expected="one of " + ", ".join(sorted(SOURCES)), found=name)
    if image_size is not None and not 1 <= image_size <= 16384:
        raise ConfigError("data.image_size is out of range", expected="1..16384 or null", found=image_size)
    if limit is not None and limit < 1:
        raise ConfigError("data.limit is out of range", expected=">= 1 or null", found=limit)
    source = SOURCES[name](path)
    if mode == "native" and isinstance(source.images, _Files):
        source = replace(source, images=source.images.with_decoder(decode_native))
    chosen = list(range(len(source.labels)))
    if limit is not None and limit < len(chosen):
        chosen = stratified_subset(source.labels, limit, seed).tolist()
    return OwnerImages(
        name=source.name,
        images=_Selection(source.images, chosen, image_size),
        labels=[source.labels[i] for i in chosen],
        classes=source.classes,
    )


def resize_area(image: GreyImage, side: int) -> GreyImage:
    """Resample to ``side`` x ``side`` by exact area averages (Pillow's box filter), uint8 in and out."""
    if image.shape == (side, side):
        return image
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX))


def resize_native(image: OwnerImage, side: int) -> OwnerImage:
    """Resample like :func:`resize_area`, channel by channel and in the image's own dtype."""
    if image.shape[-2:] == (side, side):
        return image
    if image.dtype == np.uint8:
        planes = [resize_area(plane.astype(np.uint8, copy=False), side) for plane in _planes(image)]
        return planes[0] if image.ndim == 2 else np.stack(planes)
    levels = [
        Image.fromarray(plane.astype(np.float32)).resize((side, side), Image.Resampling.BOX)
        for plane in _planes(image)
    ]
    deep: NDArray[np.uint16] = np.rint(np.stack([np.asarray(level) for level in levels])).astype(np.uint16)
    return deep.reshape(*image.shape[:-2], side, side)


def _planes(image: OwnerImage) -> list[OwnerImage]:
    return [image] if image.ndim == 2 else list(image)


class _Selection(Sequence[OwnerImage]):
    """Some of the images, in order, resized on access."""

    def __init__(self, images: Sequence[OwnerImage], chosen: list[int], side: int | None) -> None:
        self._images, self._chosen, self._side = images, chosen, side

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> OwnerImage: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[OwnerImage]: ...
    def __getitem__(self, index: int | slice) -> OwnerImage | Sequence[OwnerImage]:
        if isinstance(index, slice):
            return _Selection(self._images, self._chosen[index], self._side)
        image = self._images[self._chosen[index]]
        return image if self._side is None else resize_native(image, self._side)


class _Files(Sequence[OwnerImage]):
    """Image files, decoded on access: a large folder never lies in memory at once."""

    def __init__(self, paths: list[Path], decode: Callable[[Path], OwnerImage]) -> None:
        self._paths, self._decode = paths, decode

    def with_decoder(self, decode: Callable[[Path], OwnerImage]) -> _Files:
        """Return the same files, decoded another way."""
        return _Files(self._paths, decode)

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> OwnerImage: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[OwnerImage]: ...
    def __getitem__(self, index: int | slice) -> OwnerImage | Sequence[OwnerImage]:
        if isinstance(index, slice):
            return _Files(self._paths[index], self._decode)
        return self._decode(self._paths[index])


def decode_grey(path: Path) -> GreyImage:
    """Decode an image file to grey.

    Parameters
    ----------
    path
        A file that Pillow reads, with at most 8 bits per channel; colour is weighted by ITU-R 601.

    Returns
    -------
    uint8 array, shape (H, W)

    Raises
    ------
    ImageFormatError
        The file does not decode, or has more than 8 bits per channel (no silent clipping).
    """
    try:
        with Image.open(path) as image:
            if image.mode not in _EIGHT_BIT_MODES:
                raise ImageFormatError(
                    f"an image has more than 8 bits per channel: {path}",
                    expected="8-bit grey or colour",
                    found=f"mode {image.mode}",
                    remedy="Convert it to 8 bits first",
                )
            return np.asarray(image.convert("L"))
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as exc:
        raise ImageFormatError(
            f"an image file cannot be decoded: {path}", remedy="Replace or remove the file"
        ) from exc


def decode_native(path: Path) -> OwnerImage:
    """Decode an image file as it is: grey of 8 or 16 bits (H, W), or colour of 8 bits (3, H, W).

    Palettes become colour, and transparency is dropped.

    Raises
    ------
    ImageFormatError
        The file does not decode, or has colour of more than 8 bits (Pillow would cut it to 8).
    """
    try:
        with Image.open(path) as image:
            deep = any("16" in str(tile[3]) for tile in getattr(image, "tile", ()))
            if image.mode in _SIXTEEN_BIT_MODES:
                pixels = np.asarray(image)
                if pixels.min() < 0 or pixels.max() > np.iinfo(np.uint16).max:
                    raise _too_deep(path, image.mode)
                return pixels.astype(np.uint16)
            if image.mode not in _EIGHT_BIT_MODES or deep:
                raise _too_deep(path, image.mode)
            if image.mode in _GREY_MODES:
                return np.asarray(image.convert("L"))
            return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as exc:
        raise ImageFormatError(
            f"an image file cannot be decoded: {path}", remedy="Replace or remove the file"
        ) from exc


def _too_deep(path: Path, mode: str) -> ImageFormatError:
    return ImageFormatError(
        f"an image has more bits than can be kept: {path}",
        expected="grey of 8 or 16 bits, or colour of 8 bits",
        found=f"mode {mode}",
        remedy="Convert it first",
    )


def _load_elpv(_path: Path | None) -> OwnerImages:
    utils = _require(*_PACKAGES["elpv"])
    images, probability, _ = utils.load_dataset()
    labels = (np.asarray(probability) >= _DEFECT_PROBABILITY).astype(int).tolist()
    return OwnerImages("elpv", images, labels, _ELPV_CLASSES)


def _load_digits(_path: Path | None) -> OwnerImages:
    digits: Any = _require(*_PACKAGES["digits"]).load_digits()
    images = np.rint(digits.images * (255.0 / 16.0)).astype(np.uint8)
    return OwnerImages(
        "digits", images, [int(v) for v in digits.target], tuple(str(v) for v in digits.target_names)
    )


def _load_fashion_mnist(path: Path | None) -> OwnerImages:
    images, labels = fashion_mnist.load_fashion_mnist(path)
    return OwnerImages("fashion_mnist", images, labels, fashion_mnist.CLASSES)  # type: ignore[arg-type]


def _load_synthetic(_path: Path | None) -> OwnerImages:
    images = synthetic.SyntheticImages()
    return OwnerImages("synthetic", images, synthetic.synthetic_labels(), synthetic.CLASSES)


def _load_folder(path: Path | None) -> OwnerImages:
    if path is None:
        raise ConfigError(
            "data=folder needs a folder", expected="data.path", remedy="Set data.path=FOLDER_OF_CLASS_FOLDERS"
        )
    if not path.is_dir():
        raise EmptyDatasetError(f"the image folder does not exist: {path}", remedy="Check data.path")
    # Imported here: torchvision pulls in torch.
    from torchvision.datasets.folder import (
        IMG_EXTENSIONS,
        find_classes,
        make_dataset,
    )

    hint = "Put the images of each class in a subfolder of its own: " + str(path / "CLASS" / "image.png")
    try:
        classes, indices = find_classes(str(path))
    except FileNotFoundError as exc:
        raise EmptyDatasetError(f"the image folder has no class subfolders: {path}", remedy=hint) from exc
    pairs = make_dataset(str(path), indices, extensions=IMG_EXTENSIONS, allow_empty=True)
    if not pairs:
        raise EmptyDatasetError(f"the image folder holds no image: {path}", remedy=hint)
    if empty := sorted(set(range(len(classes))) - {label for _, label in pairs}):
        raise EmptyDatasetError(
            f"a class folder holds no image: {path / classes[empty[0]]}", remedy="Fill or remove it"
        )
    files = _Files([Path(file) for file, _ in pairs], decode_grey)
    return OwnerImages(path.resolve().name, files, [label for _, label in pairs], tuple(classes))


def source_classes(name: str, path: Path | None = None) -> tuple[str, ...]:
    """Return a data set's class names, without decoding an image.

    Raises
    ------
    ConfigError, MissingExtraError, EmptyDatasetError
        As :func:`load_source`.
    """
    if name == "elpv":
        require_source(name)
        return _ELPV_CLASSES
    return load_source(name, path=path, seed=0).classes


def require_source(name: str) -> None:
    """Check that a data set's package is there, without loading an image.

    Raises
    ------
    MissingExtraError
        It is not installed.
    """
    if name in _PACKAGES:
        _require(*_PACKAGES[name])


def _require(module: str, setting: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise MissingExtraError(
            f"{setting} needs the package {module.partition('.')[0]}, which is not installed",
            remedy=f"Run: pip install -e '.[{extra}]'",
        ) from exc


SOURCES: dict[str, Loader] = {
    "elpv": _load_elpv,
    "digits": _load_digits,
    "fashion_mnist": _load_fashion_mnist,
    "synthetic": _load_synthetic,
    "folder": _load_folder,
}
"""Data sets by name; add one by adding an entry."""

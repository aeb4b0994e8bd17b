"""Search files for canaries: raw, in hex, in base64, and inside whatever inflates."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable
from pathlib import Path


def traces(files: Iterable[Path], canaries: Iterable[bytes]) -> list[tuple[str, bytes]]:
    """Return every (file name, canary) that was found in any form."""
    canaries = list(canaries)
    found = []
    for file in files:
        data = file.read_bytes()
        for view in (data, *_inflated(data)):
            lower = view.lower()
            for canary in canaries:
                if canary in view or canary.hex().encode() in lower or _in_base64(canary, view):
                    found.append((file.name, canary))
    return found


def _in_base64(canary: bytes, data: bytes) -> bool:
    # base64 has three alignments; the ends of the text depend on the neighbours. A core of fewer than eight
    # letters would be found by chance.
    cores = [
        encode(canary[offset:])[:-4].rstrip(b"=")
        for offset in range(3)
        for encode in (base64.b64encode, base64.urlsafe_b64encode)
    ]
    return any(len(core) >= 8 and core in data for core in cores)


def _inflated(data: bytes) -> Iterable[bytes]:
    """Inflate from every place that looks like the start of a zlib or gzip stream."""
    for magic, bits in ((b"\x78\x01", 15), (b"\x78\x9c", 15), (b"\x78\xda", 15), (b"\x1f\x8b", 31)):
        start = data.find(magic)
        while start >= 0:
            try:
                plain = zlib.decompressobj(bits).decompress(data[start : start + (1 << 20)], 1 << 24)
            except zlib.error:
                plain = b""
            if plain:
                yield plain
            start = data.find(magic, start + 1)

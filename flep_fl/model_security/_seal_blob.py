"""SEAL's serialisation envelope: a 16-byte header and a body that may be compressed.

Layout (SEAL 4, ``native/src/seal/serialization.h``), little-endian: u16 magic 0xA15E, u8 header size 16,
u8 major, u8 minor, u8 compression (0 none, 1 zlib, 2 zstandard), u16 reserved 0, u64 total size.
"""

from __future__ import annotations

import ctypes
import struct
import zlib
from functools import cache
from importlib.util import find_spec
from typing import Any

from flep_fl.contracts.errors import MissingExtraError

HEADER = struct.Struct("<HBBBBHQ")
MAGIC = 0xA15E
MAJOR = 4
NONE, ZLIB, ZSTD = 0, 1, 2

_OVERHEAD = 1024  # a compressed body that does not shrink grows by a few bytes per 128 KiB


def wrap(body: bytes, minor: int) -> bytes:
    """Put an uncompressed body into an envelope of SEAL 4.``minor``; SEAL reads its own version only."""
    return head(len(body), minor) + body


def head(size: int, minor: int) -> bytes:
    """Return the envelope's header for an uncompressed body of ``size`` bytes."""
    return HEADER.pack(MAGIC, HEADER.size, MAJOR, minor, NONE, 0, HEADER.size + size)


def minor_version(blob: bytes) -> int:
    """Return the minor version of the SEAL that wrote ``blob``."""
    return blob[4]


def unwrap(blob: bytes, sizes: tuple[int, ...]) -> bytes:
    """Return the body, which must have exactly one of ``sizes`` bytes when decompressed.

    Decompression stops at the largest size: a small blob cannot ask for more memory than that.

    Raises
    ------
    ValueError
        The header is not SEAL 4's, the declared size is wrong, or the body has another size.
    """
    largest = max(sizes)
    if not HEADER.size <= len(blob) <= HEADER.size + largest + largest // 64 + _OVERHEAD:
        raise ValueError(f"{len(blob)} bytes cannot be one of SEAL's objects of {largest} bytes")
    magic, header_size, major, _, mode, reserved, total = HEADER.unpack_from(blob)
    if (magic, header_size, reserved) != (MAGIC, HEADER.size, 0):
        raise ValueError("it does not begin with SEAL's header")
    if major != MAJOR:
        raise ValueError(f"it was written by SEAL {major}, not {MAJOR}")
    if total != len(blob):
        raise ValueError(f"SEAL's header declares {total} bytes, there are {len(blob)}")
    packed = blob[HEADER.size :]
    if mode == NONE:
        body = packed
    elif mode == ZLIB:
        body = _inflate(packed, largest)
    elif mode == ZSTD:
        body = _zstd(packed, largest)
    else:
        raise ValueError(f"compression mode {mode} is unknown")
    if len(body) not in sizes:
        raise ValueError(f"its body has {len(body)} bytes, not {' or '.join(map(str, sizes))}")
    return body


def _inflate(packed: bytes, largest: int) -> bytes:
    stream = zlib.decompressobj()
    try:
        body = stream.decompress(packed, largest + 1)
    except zlib.error as exc:
        raise ValueError(f"its zlib stream is damaged ({exc})") from None
    if len(body) > largest or not stream.eof or stream.unused_data:
        raise ValueError("its zlib stream is truncated or decompresses to more than a ciphertext")
    return body


def _zstd(packed: bytes, largest: int) -> bytes:
    buffer = ctypes.create_string_buffer(largest)
    written = int(_zstd_decompress()(buffer, largest, packed, len(packed)))
    if written > largest:  # error codes are the largest values of size_t
        raise ValueError("its zstandard frame is damaged or decompresses to more than a ciphertext")
    return buffer.raw[:written]


@cache
def _zstd_decompress() -> Any:
    """Return ``ZSTD_decompress`` of the library inside TenSEAL's wheel.

    Python 3.11 has no zstandard of its own. The one-shot function writes into the caller's buffer and
    allocates no window, unlike the streaming one that SEAL uses.
    """
    spec = find_spec("_tenseal_cpp")
    try:
        if spec is None or spec.origin is None:
            raise OSError("not found")
        function = ctypes.CDLL(spec.origin).ZSTD_decompress
    except (OSError, AttributeError) as exc:
        raise MissingExtraError(
            f"The installed TenSEAL offers no zstandard ({exc})", remedy="pip install 'tenseal>=0.3.16'"
        ) from None
    function.restype = ctypes.c_size_t
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t)
    return function

"""What the C library does with memory that was freed."""

from __future__ import annotations

import ctypes
import os
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_HEAP_BLOCK = 32 << 20  # the largest that glibc takes for this threshold
_KEPT = 64 << 20


@cache
def keep_freed_memory() -> bool:
    """Let the process keep up to 64 MB of freed memory for its next tensors, instead of giving it back.

    A feature map of some megabytes is freed at the end of every layer. By default glibc returns it to the
    kernel at once, which zeroes and maps the same pages again for the next layer: more work than a
    convolution with hardware for bfloat16. Blocks up to 32 MB now come from the heap, whose end is cut
    only beyond 64 MB (mallopt(3)). For the whole process, once; left alone where the user chose thresholds
    by ``MALLOC_TRIM_THRESHOLD_`` or ``MALLOC_MMAP_THRESHOLD_``, and where the C library is another one.

    Returns
    -------
    bool
        Whether the thresholds were set.
    """
    if {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & set(os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _HEAP_BLOCK)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT))

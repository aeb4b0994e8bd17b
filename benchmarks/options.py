"""Options that the benchmarks share."""

from __future__ import annotations

import argparse


def bits(text: str) -> int | tuple[int, ...]:
    """Read ``cipher.bits``: ``8``, or one number a sub-band such as ``8,6,6,6``.

    Raises
    ------
    argparse.ArgumentTypeError
        The text is neither.
    """
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text} is neither a number nor four, as in 8,6,6,6") from exc
    return numbers[0] if len(numbers) == 1 else numbers

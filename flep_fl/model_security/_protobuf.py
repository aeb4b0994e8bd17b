"""The few rules of protobuf's wire format that TenSEAL's messages need, read strictly.

See https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, BYTES = 0, 1, 2

_LONGEST_VARINT = 10


def varint(value: int) -> bytes:
    """Encode a non-negative integer."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data: bytes, offset: int) -> tuple[int, int]:
    """Decode the integer at ``offset``; returns it and the offset behind it.

    Raises
    ------
    ValueError
        The integer is truncated or longer than ten bytes.
    """
    value = 0
    for index in range(_LONGEST_VARINT):
        if offset + index >= len(data):
            raise ValueError("a number is truncated")
        byte = data[offset + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, offset + index + 1
    raise ValueError("a number is too long")


def key(field: int, wire_type: int) -> bytes:
    """Encode a field's key."""
    return varint(field << 3 | wire_type)


def length_delimited(field: int, data: bytes) -> bytes:
    """Encode a field of bytes, a string or an embedded message."""
    return b"".join((key(field, BYTES), varint(len(data)), data))


def fields(data: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """Yield ``(field number, wire type, value)``; fixed64 values are their eight bytes.

    Raises
    ------
    ValueError
        The message is truncated, or has a wire type other than varint, fixed64 and length-delimited.
    """
    offset = 0
    while offset < len(data):
        tag, offset = read_varint(data, offset)
        field, wire_type = tag >> 3, tag & 7
        if wire_type == VARINT:
            value, offset = read_varint(data, offset)
            yield field, wire_type, value
            continue
        if wire_type == BYTES:
            size, offset = read_varint(data, offset)
        elif wire_type == FIXED64:
            size = 8
        else:
            raise ValueError(f"field {field} has wire type {wire_type}")
        if size > len(data) - offset:
            raise ValueError(f"field {field} is truncated")
        yield field, wire_type, data[offset : offset + size]
        offset += size

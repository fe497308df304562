"""Image files with 16 bits per channel, which Pillow cannot write."""

import struct
import zlib

import numpy as np


def png16(values: np.ndarray) -> bytes:
    """Return the PNG of (height, width, channels) uint16: gray, RGB or RGBA"""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff16(values: np.ndarray, order: str = "<") -> bytes:
    """Return the uncompressed TIFF of (height, width, channels) uint16 or int16, little- or big-endian"""
    height, width, channels = values.shape
    pixels = values.astype(order + values.dtype.str[1:]).tobytes()
    tags = {256: [width], 257: [height], 258: [16] * channels, 259: [1], 262: [1 if channels == 1 else 2], 273: [0],
            277: [channels], 278: [height], 279: [len(pixels)], 339: [2 if values.dtype.kind == "i" else 1] * channels}
    if channels == 4:
        tags[338] = [2]
    long = {256, 257, 273, 278, 279}
    beyond = 8 + 2 + 12 * len(tags) + 4                     # offset of values that do not fit into their tag
    packed = {tag: struct.pack(f"{order}{len(own)}{'I' if tag in long else 'H'}", *own) for tag, own in tags.items()}
    far = {tag: content for tag, content in packed.items() if len(content) > 4}
    packed[273] = struct.pack(f"{order}I", beyond + sum(map(len, far.values())))
    entries, place = b"", beyond
    for tag in sorted(tags):
        content = packed[tag].ljust(4, b"\0")
        if tag in far:
            content, place = struct.pack(f"{order}I", place), place + len(far[tag])
        entries += struct.pack(f"{order}HHI", tag, 4 if tag in long else 3, len(tags[tag])) + content
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8) + struct.pack(f"{order}H", len(tags))
    return start + entries + b"\0" * 4 + b"".join(far[tag] for tag in sorted(far)) + pixels

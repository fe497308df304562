"""Damaged copies of files, each a function of the content and a seed."""

import random

EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)
KINDS = ("bit", "bit", "bit", "byte", "byte", "number", "number", "zeros", "remove", "insert", "repeat", "move", "cut")
EDGE = 600          # headers and directories are at the ends of a file


def mutated(content: bytes, seed: int, tokens: tuple[bytes, ...] = ()) -> bytes:
    """Return the content changed in one to four places: bits, bytes, numbers, zeros, parts removed, inserted, repeated or moved,
    or the end cut off. It is never unchanged.

    tokens: words of the format, which are sometimes inserted.
    """
    dice = random.Random(seed)
    data = bytearray(content)
    while bytes(data) == content:
        for _ in range(dice.choice((1, 1, 1, 2, 3, 4))):
            _change(data, dice, tokens)
    return bytes(data)


def _position(data: bytearray, dice: random.Random) -> int:
    """Return a random position, half of the time near one of the ends."""
    edge = min(EDGE, len(data))
    start = dice.choice((0, 0, len(data) - edge, len(data) - edge, *[None] * 4))
    return dice.randrange(max(1, len(data))) if start is None else start + dice.randrange(max(1, edge))


def _change(data: bytearray, dice: random.Random, tokens: tuple[bytes, ...]) -> None:
    kind, at, source, size = dice.choice(KINDS), _position(data, dice), _position(data, dice), dice.choice((1, 2, 4, 8))
    long = dice.choice((size, 16, 64, 256, 512, 1024))
    if kind == "bit" and data:
        data[at] ^= 1 << dice.randrange(8)
    elif kind == "byte" and data:
        data[at] = dice.choice((dice.randrange(256), 0, 0x7F, 0x80, 0xFF, *b"09.-"))
    elif kind == "number":
        number = dice.choice((*EXTREMES, len(data), dice.randrange(1 << 16))) & ((1 << 8 * size) - 1)
        data[at:at + size] = number.to_bytes(size, dice.choice(("little", "big")))
    elif kind == "zeros":
        data[at:at + long] = bytes(len(data[at:at + long]))
    elif kind == "remove":
        del data[at:at + long]
    elif kind == "insert":
        data[at:at] = dice.choice((dice.randbytes(size), bytes(size), data[:size], *tokens))
    elif kind == "repeat":
        data[at:at] = data[source:source + long]
    elif kind == "move":
        part = data[source:source + long]
        data[at:at + len(part)] = part
    elif kind == "cut":
        del data[dice.choice((at, dice.randrange(max(1, len(data))))):]

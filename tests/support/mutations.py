"""Damaged copies of files, each a function of the content and a seed."""

import random

EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)
EDGE = 600          # what a format says of itself stands at its ends


def mutated(content: bytes, seed: int, tokens: tuple[bytes, ...] = ()) -> bytes:
    """One to four changes: bits, bytes, numbers, runs of zeros, parts taken out, put in, doubled, moved, or the end cut off.

    tokens: words of the format, put in here and there. Never the content itself, but for contents of a byte or two.
    """
    dice = random.Random(seed)
    data = bytearray(content)
    while bytes(data) == content:
        for _ in range(dice.choice((1, 1, 1, 2, 3, 4))):
            dice.choice(CHANGES)(data, dice, tokens)
    return bytes(data)


def _place(data: bytearray, dice: random.Random) -> int:
    """Half of the time near one of the ends."""
    edge = min(EDGE, len(data))
    start = dice.choice((0, 0, len(data) - edge, len(data) - edge, *[None] * 4))
    return dice.randrange(max(1, len(data))) if start is None else start + dice.randrange(max(1, edge))


def _bit(data, dice, tokens):
    if data:
        data[_place(data, dice)] ^= 1 << dice.randrange(8)


def _byte(data, dice, tokens):
    if data:
        data[_place(data, dice)] = dice.choice((dice.randrange(256), 0, 0x7F, 0x80, 0xFF, ord("0"), ord("9"), ord("."), ord("-")))


def _number(data, dice, tokens):
    size, place = dice.choice((1, 2, 4, 8)), _place(data, dice)
    number = dice.choice((*EXTREMES, len(data), dice.randrange(1 << 16))) & ((1 << 8 * size) - 1)
    data[place:place + size] = number.to_bytes(size, dice.choice(("little", "big")))


def _zeros(data, dice, tokens):
    place, size = _place(data, dice), dice.choice((4, 16, 64, 512))
    data[place:place + size] = bytes(len(data[place:place + size]))


def _take_out(data, dice, tokens):
    place = _place(data, dice)
    del data[place:place + dice.choice((1, 2, 8, 64, 1024))]


def _put_in(data, dice, tokens):
    place, size = _place(data, dice), dice.choice((1, 2, 8, 64))
    data[place:place] = dice.choice((dice.randbytes(size), bytes(size), data[:size], *tokens))


def _double(data, dice, tokens):
    start, place = _place(data, dice), _place(data, dice)
    data[place:place] = data[start:start + dice.choice((1, 8, 64, 512))]


def _move(data, dice, tokens):
    start, place, size = _place(data, dice), _place(data, dice), dice.choice((1, 4, 32, 256))
    part = data[start:start + size]
    data[place:place + len(part)] = part


def _cut(data, dice, tokens):
    del data[dice.choice((_place(data, dice), dice.randrange(max(1, len(data))))):]


CHANGES = (_bit, _bit, _bit, _byte, _byte, _number, _number, _zeros, _take_out, _put_in, _double, _move, _cut)

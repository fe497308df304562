"""Follows a pickle step by step without building anything of it, and tells what it would make.

What PyTorch's own unpickler allows is wider than what weights need, and some of it takes any amount of memory or time from
a few bytes: bytearray(10**12), tuples within tuples that take 2^n steps to hash, a storage larger than the file. Here a
pickle passes if it makes plain values, tensors over storages, and the classes that the caller names; the sizes of the
storages are handed back, to be compared with the file. The instructions are those of pickle protocol 2 (PEP 307), which
torch.save writes; pickletools decodes them.
"""

import dataclasses
import math
import pickletools
import re
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

MAX_STEPS = 500_000
MAX_CALLS = 100_000              # a tensor takes two; PyTorch takes longer over one than over any other step
MAX_SIDES = 64                   # dimensions
MAX_TUPLE = 10_000               # values in a tuple, with all that is inside it
MAX_TUPLE_DEPTH = 50             # Python compares and prints them without looking how deep it is
MAX_KEY = 1 << 32                # an integer as a key; integers that share a hash would make a dictionary's time quadratic
MAX_NUMBERED = 100_000           # keys that are integers, as those of optimizer states
MAX_STATE = 100_000              # attributes, counted anew for each object that gets them
LEGACY_NUMBER = 0x1950A86A20F9469CFC6C        # the older format's first pickle; no other integer is that long

ITEM_BYTES = {"DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4,
              "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1, "ComplexFloatStorage": 8,
              "ComplexDoubleStorage": 16}
STORAGES = {f"torch.{name}": bytes_each for name, bytes_each in ITEM_BYTES.items()} | {"torch.storage.UntypedStorage": 1}
DTYPES = {f"torch.{name}" for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8",
                                       "bool", "complex64", "complex128")}
TENSOR, PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
DICTS = {"dict", "collections.OrderedDict"}
# With how many arguments; None: any. No sets and no Counter, which copy what they are given, however often that is.
CALLS = {TENSOR: 6, PARAMETER: 3, "collections.OrderedDict": 0, "torch.Size": 1, "torch.device": None}
CONSTANTS = {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class PickleError(ValueError):
    """What is wrong with a file; without its path."""


class Storage(NamedTuple):
    """The memory of one or more tensors: numbers, and bytes of all of them."""

    numel: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class _Global:
    name: str


@dataclasses.dataclass
class _Made:
    kind: str
    numel: int = 0                   # of a storage
    items: int = dataclasses.field(default=0, compare=False)           # of a dictionary, so far


class _Tuple(NamedTuple):
    items: tuple
    size: int
    depth: int


class Scan:
    """`run(stream)` -> follows one pickle; then `storages` by key, and `result`: plain values, lists and names as they are,
    the rest by kind. legacy=True: of the format before 2020, whose storages are named with one value more.

    Raises PickleError, or what pickletools does on a stream that is no pickle.
    """

    def __init__(self, classes: Sequence[type] = (), legacy: bool = False):
        self.classes = {f"{one.__module__}.{one.__qualname__}" for one in classes}
        self.legacy = legacy
        self.storages: dict[str, Storage] = {}
        self.result: object = None
        self._stack: list = []
        self._outer: list[list] = []
        self._memo: dict[int, object] = {}
        self._calls = self._numbered = self._attributes = 0

    def run(self, stream: bytes | BinaryIO) -> None:
        try:
            for number, (step, value, _) in enumerate(pickletools.genops(stream)):
                if number > MAX_STEPS:
                    raise PickleError("describes more values than any checkpoint has")
                self._step(step.name, value)
        except (IndexError, KeyError, TypeError) as error:        # less on the stack, or something else, than a step takes
            raise PickleError("damaged: its description does not hold together") from error

    def _step(self, name: str, value: object) -> None:
        stack = self._stack
        if name in CONSTANTS:
            _require(name != "LONG1" or -1 << 63 <= value < 1 << 63 or (self.legacy and value == LEGACY_NUMBER))
            stack.append(VALUES.get(name, value))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[value] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[value])
        elif name == "MARK":
            self._outer.append(stack)
            self._stack = []
        elif name == "TUPLE":
            items = self._marked()
            self._stack.append(_tuple(items))
        elif name in ("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            count = 0 if name == "EMPTY_TUPLE" else int(name[-1])
            items = [stack.pop() for _ in range(count)][::-1]
            stack.append(_tuple(items))
        elif name == "EMPTY_DICT":
            stack.append(_Made("dict"))
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self._marked()
            _require(isinstance(self._stack[-1], list))
            self._stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else self._marked()
            self._fill(self._stack[-1], items)
        elif name == "GLOBAL":
            stack.append(_Global(self._allowed(value)))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            self._call(name)
        elif name == "BUILD":
            state, made = stack.pop(), stack[-1]
            _require(state == _Made("dict") and isinstance(made, _Made)
                     and made.kind in self.classes | {"collections.OrderedDict"})
            self._attributes += state.items
            if self._attributes > MAX_STATE:
                raise PickleError("describes more attributes than any checkpoint has")
        elif name == "STOP":
            self.result = stack.pop()
            _require(not stack and not self._outer)
        elif name != "PROTO" or value != 2:
            raise PickleError(f"its description has a step ({name}) that torch.save does not write; damaged")

    def _fill(self, made: object, items: list) -> None:
        """A dictionary, with keys and values in turn. Keys may be what cannot be made to share a hash: text, whose hash Python
        draws anew in every process, and small integers."""
        _require(len(items) % 2 == 0 and isinstance(made, _Made) and made.kind in DICTS)
        for key in items[::2]:
            if type(key) is int and abs(key) < MAX_KEY:
                self._numbered += 1
            elif type(key) is not str:
                raise PickleError("a dictionary whose keys are neither text nor small integers: no file of weights needs that")
        if self._numbered > MAX_NUMBERED:
            raise PickleError("describes more numbered entries than any checkpoint has")
        made.items += len(items) // 2

    def _marked(self) -> list:
        items, self._stack = self._stack, self._outer.pop()
        return items

    def _allowed(self, value: str) -> str:
        name = re.sub("^__builtin__ ", "builtins ", value).replace(" ", ".")
        if name in CALLS or name in STORAGES or name in DTYPES or name in self.classes:
            return name
        if not re.fullmatch(r"[\w.]{1,200}", name):
            raise PickleError("damaged: its description does not hold together")
        raise PickleError(f"asks for {name}, which no file of weights needs: nothing was run; take a file that holds arrays "
                          "alone, or a .safetensors file")

    def _call(self, step: str) -> None:
        arguments, made = self._stack.pop(), self._stack.pop()
        _require(isinstance(arguments, _Tuple) and isinstance(made, _Global))
        if step == "NEWOBJ":
            _require(made.name in self.classes and not arguments.items)
        else:
            _require(made.name in CALLS and CALLS[made.name] in (None, len(arguments.items)))
        if made.name == TENSOR:
            _check_tensor(*arguments.items)
        if made.name == "torch.Size":
            size, = arguments.items
            _require(isinstance(size, _Tuple) and len(size.items) <= MAX_SIDES)
        if made.name == PARAMETER:
            of, grad, hooks = arguments.items
            _require(of == _Made(TENSOR) and type(grad) is bool and hooks == _Made("collections.OrderedDict"))
        self._calls += 1
        if self._calls > MAX_CALLS:
            raise PickleError("describes more arrays than any checkpoint has")
        self._stack.append(_Made(made.name))

    def _storage(self, named: object) -> _Made:
        """("storage", class, key, where it was, how many numbers), and in the older format a view, of which there is none."""
        _require(isinstance(named, _Tuple) and len(named.items) == (6 if self.legacy else 5))
        word, kind, key, place, numel, *view = named.items
        _require(word == "storage" and isinstance(kind, _Global) and kind.name in STORAGES and type(key) is str
                 and type(place) is str and type(numel) is int and numel >= 0 and not any(view))
        storage = Storage(numel, numel * STORAGES[kind.name])
        _require(self.storages.setdefault(key, storage) == storage)
        return _Made("storage", numel)


def _check_tensor(storage: object, offset: object, size: object, stride: object, grad: object, hooks: object) -> None:
    """All its numbers lie in the storage, no more than those: else PyTorch makes the storage larger, to any size."""
    _require(isinstance(storage, _Made) and storage.kind == "storage" and type(offset) is int and type(grad) is bool
             and isinstance(size, _Tuple) and isinstance(stride, _Tuple) and hooks == _Made("collections.OrderedDict"))
    sides, steps = size.items, stride.items
    _require(len(sides) == len(steps) <= MAX_SIDES and all(type(number) is int and number >= 0 for number in sides + steps))
    numel = math.prod(sides)
    reach = offset + sum((side - 1) * step for side, step in zip(sides, steps)) + 1 if numel else offset
    if numel > storage.numel or offset < 0 or reach > storage.numel:
        shape = " x ".join(map(str, sides))[:100]
        raise PickleError(f"an array of {shape} numbers of which {storage.numel} are there: not plain, or damaged")


def _tuple(items: list) -> _Tuple:
    inside = [item for item in items if isinstance(item, _Tuple)]
    size = 1 + len(items) + sum(item.size for item in inside)
    depth = 1 + max((item.depth for item in inside), default=0)
    if size > MAX_TUPLE or depth > MAX_TUPLE_DEPTH:
        raise PickleError(f"a tuple of {min(size, 10 ** 15)} values, {depth} deep: no file of weights needs that")
    return _Tuple(tuple(items), size, depth)


def _require(holds: bool) -> None:
    if not holds:
        raise PickleError("damaged: its description does not hold together")

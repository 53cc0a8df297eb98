"""The pickle inside a torch checkpoint, read as data: nothing in it is ever run or imported.

A pickle is a program. `pickletools.genops` only splits it into opcodes; the loop below knows the
thirty that torch writes. A global stays a name, REDUCE builds tensors and ordered dicts for the
few names listed here, and everything else is refused.
"""

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jft.errors import WeightsError
from jft.weights import limits
from jft.weights.limits import refuse

_NAMES = {opcode.code: opcode.name for opcode in pickletools.opcodes}
_OPCODES = 500_000  # about 12,000 tensors; a second of reading

# Global name -> dtype of the storages of that class; None: bytes, the tensor names its own dtype.
_STORAGES: dict[str, np.dtype | None] = {
    "torch FloatStorage": np.dtype("<f4"),
    "torch DoubleStorage": np.dtype("<f8"),
    "torch HalfStorage": np.dtype("<f2"),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch LongStorage": np.dtype("<i8"),
    "torch IntStorage": np.dtype("<i4"),
    "torch ShortStorage": np.dtype("<i2"),
    "torch CharStorage": np.dtype("i1"),
    "torch ByteStorage": np.dtype("u1"),
    "torch BoolStorage": np.dtype("?"),
    "torch.storage UntypedStorage": None,
}
_DTYPES: dict[str, np.dtype] = {
    "torch uint16": np.dtype("<u2"),
    "torch uint32": np.dtype("<u4"),
    "torch uint64": np.dtype("<u8"),
    "torch float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "torch float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
_ORDERED_DICT = "collections OrderedDict"
_CALLS = (
    _ORDERED_DICT,
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_parameter",
)
_ALLOWED = frozenset((*_STORAGES, *_DTYPES, *_CALLS))


class _Global(NamedTuple):
    """The name of a class or function; never looked up."""

    name: str


class Storage(NamedTuple):
    """A run of numbers in the file: `numel` of `dtype`, or bytes where the dtype is None."""

    key: str
    dtype: np.dtype | None
    numel: int

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return self.numel * _width(self.dtype)


@dataclass(frozen=True)
class Tensor:
    """A view on a storage; offset and strides in elements of `dtype`."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_PLAIN = (
    "MARK BINPUT LONG_BINPUT BINGET LONG_BINGET EMPTY_DICT EMPTY_LIST GLOBAL PROTO STOP".split()
)
_LITERALS = frozenset(
    "BINUNICODE SHORT_BINSTRING BINSTRING BININT BININT1 BININT2 LONG1 BINFLOAT".split()
)


class PickleReader:
    """Reads pickle opcodes into plain containers, `_Global`, `Storage` and `Tensor`."""

    def __init__(self, path: Path, file_bytes: int) -> None:
        """Reads for the file at `path`; no storage may claim more than `file_bytes`."""
        self.path = path
        self.file_bytes = file_bytes
        self.storages: dict[str, Storage] = {}
        self.opcodes = 0

    def load(self, stream: io.BytesIO) -> Any:
        """Reads one pickle and leaves `stream` behind its STOP."""
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        content, opcodes = stream.getbuffer(), pickletools.genops(stream)
        try:
            while True:
                self._look_at(content, stream)
                opcode, argument, _ = next(opcodes)
                if opcode.name == "STOP":
                    (result,) = self.stack
                    return result
                self._step(opcode.name, argument)
        except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
            if isinstance(error, WeightsError):
                raise
            refuse(self.path, f"its pickle is damaged: {str(error)[:120] or type(error).__name__}")

    def _look_at(self, content: memoryview, stream: io.BytesIO) -> None:
        """Refuses an opcode that torch does not write before anything decodes its argument."""
        start = stream.tell()
        code = bytes(content[start : start + 1])
        if code == b"c":
            names = stream.readline() + stream.readline()
            stream.seek(start)
            if b"\\" in names:  # genops would unescape it; names of classes need none
                refuse(self.path, f"refused: it names {names[:200]!r}")
        self.opcodes += 1
        if self.opcodes > _OPCODES:
            refuse(self.path, f"its pickle has more than {_OPCODES} opcodes")
        if code and code not in _CODES:
            known = _NAMES.get(code.decode("latin-1"))
            what = known if known else f"{code[0]:#x}"
            refuse(self.path, f"refused: the pickle opcode {what}, which torch does not write")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "GLOBAL":
            stack.append(self._global(argument))
        elif name in _ACTIONS:
            _ACTIONS[name](self)
        elif argument != 2:  # of PROTO, the only one left
            refuse(self.path, f"pickle protocol {argument}; torch.save writes protocol 2")

    def _global(self, name: str) -> _Global:
        if name not in _ALLOWED:
            refuse(
                self.path,
                f"refused: it names {name[:200].replace(' ', '.')!r}, and only tensors are "
                "read; save the state_dict alone, or as safetensors",
            )
        return _Global(name)

    def _pop_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                refuse(self.path, "its pickle is damaged: no MARK")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def _tuple(self, count: int | None) -> None:
        if count is None:
            items = self._pop_mark()
        else:
            items = [self.stack.pop() for _ in range(count)][::-1]
        if any(item is _MARK for item in items):
            refuse(self.path, "its pickle is damaged: a MARK inside a tuple")
        self.stack.append(tuple(items))

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            refuse(self.path, "refused: its pickle sets items of something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Text and numbers only: hashing a deeply nested key would exhaust the C stack.
            if type(key) not in (str, int):
                refuse(self.path, f"a dict key is a {type(key).__name__}")
            if key in target:
                refuse(self.path, f"the key {str(key)[:200]!r} occurs twice")
            target[key] = value

    def _append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            refuse(self.path, "refused: its pickle appends to something that is no list")
        self.stack[-1].extend(items)

    def _build(self) -> None:
        self.stack.pop()  # the state: `_metadata` of a state_dict, of no use here
        if type(self.stack[-1]) is not dict:
            refuse(self.path, "refused: its pickle sets the state of an object")

    def _persistent(self) -> None:
        reference = self.stack.pop()
        if (
            type(reference) is not tuple
            or len(reference) not in (5, 6)
            or reference[0] != "storage"
        ):
            refuse(self.path, "refused: a persistent reference that is no storage")
        _, kind, key, location, numel, *view = reference
        if (
            type(kind) is not _Global
            or kind.name not in _STORAGES
            or any(v is not None for v in view)
        ):
            refuse(self.path, "refused: a storage of an unknown kind")
        if type(key) is not str or type(location) is not str or type(numel) is not int:
            refuse(self.path, "refused: a storage with a malformed reference")
        dtype = _STORAGES[kind.name]
        limits.check_name(self.path, key)
        limits.check_shape(self.path, f"storage {key!r}", (numel,), _width(dtype), self.file_bytes)
        storage = Storage(key, dtype, numel)
        if self.storages.setdefault(key, storage) != storage:
            refuse(self.path, f"storage {key!r} is described twice, differently")
        self.stack.append(storage)

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if (
            type(function) is not _Global
            or function.name not in _CALLS
            or type(arguments) is not tuple
        ):
            refuse(self.path, "refused: its pickle calls something that builds no tensor")
        if function.name == _ORDERED_DICT:
            if arguments:
                refuse(self.path, "refused: an OrderedDict with arguments")
            self.stack.append({})
        elif function.name.endswith("_rebuild_parameter"):
            tensor, _, hooks = arguments
            if type(tensor) is not Tensor or hooks:
                refuse(self.path, "refused: a Parameter that is not made of a tensor")
            self.stack.append(tensor)
        else:
            self.stack.append(self._tensor(arguments, typed=function.name.endswith("v2")))

    def _tensor(self, arguments: tuple[Any, ...], typed: bool) -> Tensor:
        storage, offset, shape, strides, _, hooks, *rest = arguments
        if type(storage) is not Storage or hooks or len(rest) > (1 if typed else 2):
            refuse(self.path, "refused: a tensor that is not made of a storage")
        dtype = storage.dtype
        if not typed:
            named = rest.pop(0)
            dtype = _DTYPES.get(named.name) if type(named) is _Global else None
        if dtype is None or any(rest):  # metadata: conjugate or negated views
            refuse(self.path, "refused: a tensor of an unknown dtype or with metadata")
        _check_view(self.path, storage, dtype, offset, shape, strides)
        return Tensor(storage, dtype, offset, shape, strides)


def _width(dtype: np.dtype | None) -> int:
    return 1 if dtype is None else dtype.itemsize


def _check_view(
    path: Path, storage: Storage, dtype: np.dtype, offset: Any, shape: Any, strides: Any
) -> None:
    """Refuses a view with a place outside its storage, or with more elements than the storage."""
    what = f"a tensor of storage {storage.key!r}"
    if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
        refuse(path, f"{what} has a malformed shape")
    held = storage.nbytes
    limits.check_shape(path, what, shape, dtype.itemsize, held)
    if any(type(step) is not int or step < 0 for step in (offset, *strides)):
        refuse(path, f"{what} has a negative or malformed offset or stride")
    last = sum((side - 1) * step for side, step in zip(shape, strides, strict=True))
    places = 0 if 0 in shape else offset + last + 1
    if places * dtype.itemsize > held:
        refuse(path, f"{what} reaches beyond its end")


_ACTIONS: dict[str, Callable[[PickleReader], None]] = {
    "TUPLE": lambda reader: reader._tuple(None),
    "TUPLE1": lambda reader: reader._tuple(1),
    "TUPLE2": lambda reader: reader._tuple(2),
    "TUPLE3": lambda reader: reader._tuple(3),
    "SETITEMS": lambda reader: reader._set_items(reader._pop_mark()),
    "SETITEM": lambda reader: reader._set_items([reader.stack.pop(), reader.stack.pop()][::-1]),
    "APPENDS": lambda reader: reader._append(reader._pop_mark()),
    "APPEND": lambda reader: reader._append([reader.stack.pop()]),
    "BUILD": PickleReader._build,
    "BINPERSID": PickleReader._persistent,
    "REDUCE": PickleReader._reduce,
}
_CODES = frozenset(
    opcode.code.encode("latin-1")
    for opcode in pickletools.opcodes
    if opcode.name in (*_LITERALS, *_CONSTANTS, *_ACTIONS, *_PLAIN)
)

"""Makes torch files by hand, honest ones and hostile ones, without torch.

`honest()` gives one good file a layout: what each hostile file would be without its one trick.
`hostile(marker)` gives at least twenty files a reader must refuse; those that carry code create the
file `marker` if anything runs it.
"""

import io
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

MAGIC = 0x1950A86A20F9469CFC6C
LONG = 40_000  # such pickles come in one layout only, to keep the tests quick
DATA = struct.pack("<6f", *range(6))
SYSTEM = {
    "protocol_version": 1001,
    "little_endian": True,
    "type_sizes": {"short": 2, "int": 4, "long": 4},
}


def text(value: str) -> bytes:
    """BINUNICODE."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    """BININT, or LONG1 where that is too small."""
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = pickle.encode_long(value)
    return b"\x8a" + bytes([len(raw)]) + raw


def name(module: str, attribute: str) -> bytes:
    """GLOBAL."""
    return b"c" + f"{module}\n{attribute}\n".encode()


def numbers(values: tuple[int, ...]) -> bytes:
    """A tuple of integers."""
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(
    key: str = "0", numel: int = 6, kind: str = "FloatStorage", legacy: bool = False
) -> bytes:
    """A persistent reference to a storage."""
    parts = text("storage") + name("torch", kind) + text(key) + text("cpu") + number(numel)
    return b"(" + parts + (b"N" if legacy else b"") + b"tQ"


def tensor(
    reference: bytes,
    shape: tuple[int, ...] = (2, 3),
    strides: tuple[int, ...] = (3, 1),
    offset: int = 0,
    hooks: bytes = name("collections", "OrderedDict") + b")R",
) -> bytes:
    """A call of _rebuild_tensor_v2."""
    arguments = reference + number(offset) + numbers(shape) + numbers(strides) + b"\x89" + hooks
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR"


def state_dict(value: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    """The pickle of {"w": value}, with room for more opcodes before and after it."""
    return b"\x80\x02" + before + b"}" + b"(" + text("w") + value + b"u" + after + b"."


def archive(
    pickled: bytes,
    data: bytes = DATA,
    members: tuple[tuple[str, bytes], ...] = (),
    compression: int = zipfile.ZIP_STORED,
    byteorder: bytes = b"little",
) -> bytes:
    """The zip layout around a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        three = (("data.pkl", pickled), ("byteorder", byteorder), ("data/0", data))
        for path, content in (*((f"archive/{name}", content) for name, content in three), *members):
            info = zipfile.ZipInfo(path)
            info.compress_type = compression
            file.writestr(info, content)
    return buffer.getvalue()


def older(
    pickled: bytes,
    keys: tuple[str, ...] = ("0",),
    counts: tuple[int, ...] = (6,),
    data: bytes = DATA,
    system: dict | None = None,
) -> bytes:
    """The legacy layout around a pickle."""
    heads = [pickle.dumps(value, protocol=2) for value in (MAGIC, 1001, system or SYSTEM)]
    storages = b"".join(struct.pack("<q", count) + data for count in counts)
    return b"".join(heads) + pickled + pickle.dumps(list(keys), protocol=2) + storages


def honest() -> dict[str, bytes]:
    """One good file of each layout, {"w": float32 [2, 3] = 0..5}."""
    return {
        "zip": archive(state_dict(tensor(storage()))),
        "legacy": older(state_dict(tensor(storage(legacy=True)))),
    }


def _code(marker: Path) -> dict[str, bytes]:
    """Pickles that run code when unpickled; each makes `marker`."""
    touch = text(f"touch {marker}")
    call = name("os", "system") + touch + b"\x85R"
    evaluate = text(f"open({str(marker)!r}, 'w').close()")
    good = tensor(storage())
    inner = pickle.dumps(_Reduced(marker), protocol=2)
    return {
        "reduce of os.system": state_dict(call),
        "reduce of builtins.eval": state_dict(name("builtins", "eval") + evaluate + b"\x85R"),
        "reduce of posix.system before the weights": state_dict(
            good, before=name("posix", "system") + touch + b"\x85R0"
        ),
        "code behind the weights, popped": state_dict(good, after=call + b"0"),
        "stack_global": state_dict(text("os") + text("system") + b"\x93" + touch + b"\x85R"),
        "stack_global in protocol 4": b"\x80\x04"
        + state_dict(good)[2:-1]
        + text("os")
        + text("system")
        + b"\x93"
        + touch
        + b"\x85R0.",
        "inst": state_dict(b"(" + touch + b"ios\nsystem\n"),
        "obj": state_dict(b"(" + name("os", "system") + touch + b"o"),
        "newobj": state_dict(name("subprocess", "Popen") + b"(" + touch + b"t\x81"),
        "build with a foreign class": state_dict(
            name("functools", "partial")
            + name("os", "system")
            + b"\x85R"
            + b"("
            + name("os", "system")
            + touch
            + b"\x85}N"
            + b"tb"
        ),
        "build on a tensor": state_dict(good + b"}b"),
        "setstate on an allowed function": state_dict(
            name("torch._utils", "_rebuild_tensor_v2") + b"}" + text("__code__") + touch + b"sb"
        ),
        "reduce through an allowed name": state_dict(
            name("collections", "OrderedDict") + b"(" + call + b"tR"
        ),
        "dotted attribute of an allowed module": state_dict(
            name("collections", "OrderedDict.__init__.__globals__") + b")R"
        ),
        "attribute of torch's modules": state_dict(
            name("torch.serialization", "load") + text(str(marker)) + b"\x85R"
        ),
        "torch.load of another file": state_dict(name("torch", "load") + touch + b"\x85R"),
        "getattr": state_dict(name("builtins", "getattr") + good + text("__class__") + b"\x86R"),
        "namespace": state_dict(name("argparse", "Namespace") + b")R"),
        "ext1": state_dict(b"\x82\x01" + b")R"),
        "ext4": state_dict(b"\x84\xff\xff\xff\x7f" + b")R"),
        "hooks of a tensor": state_dict(tensor(storage(), hooks=b"}" + text("x") + call + b"s")),
        "nested pickle": state_dict(
            name("_pickle", "loads") + b"B" + struct.pack("<I", len(inner)) + inner + b"\x85R"
        ),
        "text persistent id": state_dict(b"Pcpu\n"),
        "persistent id of a module": state_dict(
            b"(" + text("module") + name("os", "system") + touch + touch + b"tQ"
        ),
        "out-of-band buffer": state_dict(b"\x97"),
    }


class _Reduced:
    """Runs a shell command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.marker}",)


def _lies() -> dict[str, bytes]:
    """Pickles that claim what the file does not have."""
    return {
        "negative stride": state_dict(tensor(storage(), strides=(-3, 1))),
        "negative offset": state_dict(tensor(storage(), offset=-4)),
        "offset beyond the storage": state_dict(tensor(storage(), offset=1)),
        "stride beyond the storage": state_dict(tensor(storage(), strides=(1 << 40, 1))),
        "negative side": state_dict(tensor(storage(), shape=(-2, 3))),
        "overflowing shape": state_dict(tensor(storage(), (1 << 32, 1 << 32), (0, 0))),
        "huge expanded shape": state_dict(tensor(storage(), (1 << 40,), (0,))),
        "huge integer": state_dict(tensor(storage(), (1 << 2000,), (1,))),
        "seventeen dimensions": state_dict(tensor(storage(), (1,) * 17, (1,) * 17)),
        "shape of a float": state_dict(
            tensor(storage()).replace(numbers((2, 3)), b"(G" + struct.pack(">d", 2.0) + b"t")
        ),
        "storage longer than the file": state_dict(tensor(storage(numel=1 << 50))),
        "negative storage": state_dict(tensor(storage(numel=-1))),
        "missing storage": state_dict(tensor(storage(key="7"))),
        "storage outside its folder": state_dict(tensor(storage(key="../../etc/passwd"))),
        "storage of another width": state_dict(tensor(storage(kind="DoubleStorage"))),
        "two lengths of one storage": state_dict(
            tensor(storage()) + text("v") + tensor(storage(numel=5), (5,), (1,))
        ),
        "a name that leaves": b"\x80\x02}" + text("../../w") + tensor(storage()) + b"s.",
        "a name of a megabyte": b"\x80\x02}" + text("w" * (1 << 20)) + tensor(storage()) + b"s.",
        "the same name twice": state_dict(tensor(storage()) + text("w") + tensor(storage())),
        "a key that cannot be hashed": b"\x80\x02}" + b"]" + tensor(storage()) + b"s.",
        "a deep tuple as key": b"\x80\x02}" + b")" + b"\x85" * 50_000 + tensor(storage()) + b"s.",
        "a deep list": state_dict(b"]" * 50_000 + b"a" * 49_999),
        "a list in itself": state_dict(b"]q\x00h\x00a"),
        "half a million opcodes": state_dict(b"Nq\x00" * 510_000 + tensor(storage())),
        "half a million marks": state_dict(b"(" * 510_000 + tensor(storage())),
        "growing tuples": state_dict(b")" + b"q\x00h\x00\x86" * 180_000),
        "a text of two gigabytes": b"\x80\x02X\xff\xff\xff\x7f" + b"w" * 64,
        "a text beyond 64 bits": b"\x80\x02\x8d" + b"\xff" * 8 + b"w" * 64,
        "a number of a gigabyte": b"\x80\x02\x8b\xff\xff\xff\x3f" + b"\x01" * 64,
        "an unknown opcode": b"\x80\x02\xfe.",
        "an empty stack": b"\x80\x02u.",
        "memo never written": b"\x80\x02h\x09.",
        "no state_dict": b"\x80\x02" + number(7) + b".",
        "an empty pickle": b"",
        "a pickle without an end": state_dict(tensor(storage()))[:-1],
        "text for a tensor": state_dict(text("weights")),
    }


def _archives() -> dict[str, bytes]:
    """Zip files whose pickle is good and whose container is not."""
    good = state_dict(tensor(storage()))
    whole = archive(good)
    twice = archive(good, members=(("archive/data/1", b"x"),)).replace(b"data/1", b"data/0")
    flipped = bytearray(whole)
    flipped[whole.index(DATA) + 5] ^= 1
    moved = bytearray(whole)
    moved[whole.index(b"PK\x01\x02", whole.index(DATA)) + 42] ^= 0xFF
    many = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, 1 << 31, 0, 0)
    return {
        "a member outside": archive(good, members=(("../../evil", b"x"),)),
        "an absolute member": archive(good, members=(("/tmp/evil", b"x"),)),
        "a windows path": archive(good, members=(("..\\evil", b"x"),)),
        "a bomb": archive(
            good, members=(("archive/x", b"\0" * (100 << 20)),), compression=zipfile.ZIP_DEFLATED
        ),
        "compressed storage": archive(good, compression=zipfile.ZIP_DEFLATED),
        "bzip2": archive(good, compression=zipfile.ZIP_BZIP2),
        "a member twice": twice,
        "two pickles": archive(good, members=(("other/data.pkl", good),)),
        "no pickle": archive(good).replace(b"data.pkl", b"dato.pkl"),
        "torchscript": archive(good, members=(("archive/constants.pkl", good),)),
        "big endian": archive(good, byteorder=b"big"),
        "storage too short": archive(good, data=DATA[:-4]),
        "storage too long": archive(good, data=DATA + b"\0" * 4),
        "a flipped bit": bytes(flipped),
        "a moved member": bytes(moved),
        "cut in the middle": whole[: len(whole) // 2],
        "cut by one byte": whole[:-1],
        "directory of two gigabytes": whole[:-22] + many,
        "only the magic": b"PK\x03\x04",
    }


def _olders() -> dict[str, bytes]:
    """Legacy files whose pickle is good and whose surroundings are not."""
    good = state_dict(tensor(storage(legacy=True)))
    whole = older(good)
    return {
        "wrong magic": whole[:6] + b"\0" + whole[7:],
        "wrong version": whole.replace(pickle.dumps(1001, protocol=2), pickle.dumps(1, protocol=2)),
        "big endian": older(good, system=SYSTEM | {"little_endian": False}),
        "unlisted storage": older(good, keys=(), counts=()),
        "storage listed twice": older(good, keys=("0", "0"), counts=(6, 6)),
        "another storage listed": older(good, keys=("1",)),
        "huge storage": older(
            state_dict(tensor(storage(numel=1 << 48, legacy=True))), counts=(1 << 48,)
        ),
        "negative count": older(good, counts=(-6,)),
        "another count": older(good, counts=(5,)),
        "cut in the storage": whole[:-1],
        "cut in the pickle": whole[:80],
        "bytes at the end": whole + b"\0",
        "a view of a storage": older(good.replace(b"NtQ", numbers((0, 0, 6)) + b"tQ")),
        "a plain pickle": pickle.dumps({"w": [1.0, 2.0]}, protocol=4),
    }


def hostile(marker: Path) -> dict[str, bytes]:
    """name -> content of files that must be refused."""
    files = {f"zip: {what}": content for what, content in _archives().items()}
    files |= {f"legacy: {what}": content for what, content in _olders().items()}
    for what, pickled in (_code(marker) | _lies()).items():
        files[f"zip: {what}"] = archive(pickled)
        if len(pickled) < LONG:
            # In the older layout a storage's reference ends in None.
            files[f"legacy: {what}"] = older(pickled.replace(b"tQ", b"NtQ"))
    files["zip: a pickle in a lying checksum"] = _wrong_checksum()
    return files


def _wrong_checksum() -> bytes:
    whole = archive(state_dict(tensor(storage())))
    right = struct.pack("<I", zlib.crc32(DATA))
    return whole.replace(right, struct.pack("<I", zlib.crc32(DATA) ^ 1))

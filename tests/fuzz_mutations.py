"""Mutations of weight files: blind ones, and ones that know the format.

Each takes a `random.Random` and a content, and returns another content. What knows the format mends
the checksums and lengths around its change, so that the change reaches the code behind them.
"""

import io
import json
import pickle
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import fuzz_seeds
import hostile_torch as make
from fuzz_seeds import INDEX, MAIN, Files

_EDGES = (0, 1, 2, 3, 7, 8, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 1 << 31, (1 << 32) - 1)
_WIDE = (*_EDGES, 1 << 33, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_MARKER = "/tmp/jft-fuzz-ran-code"


def flip(rng: Random, content: bytes) -> bytes:
    """Flips 1 to 8 bits."""
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        if out:
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def overwrite(rng: Random, content: bytes) -> bytes:
    """Replaces a run of bytes by zeros, ones or noise."""
    start = rng.randrange(len(content) + 1)
    length = min(rng.choice((1, 2, 4, 8, 16, 64)), len(content) - start)
    run = rng.choice((b"\0" * length, b"\xff" * length, rng.randbytes(length)))
    return content[:start] + run + content[start + length :]


def number(rng: Random, content: bytes) -> bytes:
    """Writes a number at the edge of some width somewhere."""
    width = rng.choice((1, 2, 4, 8))
    start = rng.randrange(max(1, len(content) - width))
    return _write(content, start, width, rng.choice(_WIDE))


def cut(rng: Random, content: bytes) -> bytes:
    """Ends the file early."""
    return content[: rng.randrange(len(content) + 1)]


def insert(rng: Random, content: bytes) -> bytes:
    """Puts noise, or a copy of a run, somewhere; at the end too."""
    start, other = (rng.randrange(len(content) + 1) for _ in range(2))
    length = rng.choice((1, 2, 8, 32))
    run = rng.choice((rng.randbytes(length), content[other : other + length]))
    return content[:start] + run + content[start:]


def remove(rng: Random, content: bytes) -> bytes:
    """Takes a run out."""
    start = rng.randrange(len(content) + 1)
    return content[:start] + content[start + rng.choice((1, 2, 4, 8, 32)) :]


BLIND = (flip, flip, overwrite, number, cut, insert, remove)


def splice(rng: Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """The start of one file and the end of another."""
    other = rng.choice(others)
    return content[: rng.randrange(len(content) + 1)] + other[rng.randrange(len(other) + 1) :]


def _write(content: bytes, start: int, width: int, value: int) -> bytes:
    raw = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    return content[:start] + raw + content[start + width :]


def _absurd(rng: Random) -> Any:
    """A value that a JSON field should not have, or only just."""
    return rng.choice(
        (
            *_WIDE, -1, -(1 << 63), 10**400, 1 << 40, 2.0, 0.5, -0.0, 1e308, float("nan"),
            float("inf"), True, False, None, "", "a", "x" * 600, "../x", "/etc/passwd", "a\0b",
            "\ud800", "\x1b[2J", "F32", "BF16", "gelu", [], {}, [[[]]], [1] * 20, [1 << 62] * 3,
            [0, 8], [8, 0], ["a"], {"a": 1}, [0.5] * 3, [0, 0, 0], _nested(rng.choice((30, 200))),
        )
    )  # fmt: skip


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def _places(value: Any, found: list[tuple[Any, Any]]) -> None:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        found.append((value, key))
        if isinstance(inner, dict | list):
            _places(inner, found)


def json_value(rng: Random, text: bytes) -> bytes:
    """Changes values, keys or structure of a JSON text; the result is JSON, but for its numbers."""
    value = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found: list[tuple[Any, Any]] = []
        _places(value, found)
        if not found:
            value["a"] = _absurd(rng)
            continue
        holder, key = rng.choice(found)
        kind = rng.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            name = rng.choice((key + "x", "", "../" + key, "k" * 700, "\0", "\ud800", "a.b"))
            holder[name] = holder.pop(key)
        elif kind == 2:
            other, there = rng.choice(found)
            try:
                holder[key] = json.loads(json.dumps(other[there]))
            except (KeyError, IndexError):  # what was there is gone already
                pass
        elif kind == 3 and type(holder[key]) is int:
            holder[key] += rng.choice((-8, -4, -1, 1, 4, 8, 1 << 32))
        elif kind == 4 and isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), _absurd(rng))
        else:
            holder[key] = _absurd(rng)
    if rng.randrange(100) == 0:
        value = _absurd(rng)
    return json.dumps(value).encode()


def safetensors(rng: Random, content: bytes) -> bytes:
    """Changes the header, and mostly its length with it."""
    length = int.from_bytes(content[:8], "little")
    text, data = content[8 : 8 + length], content[8 + length :]
    kind = rng.randrange(10)
    if kind < 6:
        text = json_value(rng, text)
    elif kind < 9:
        text = rng.choice(BLIND)(rng, text)
    if kind == 9 or rng.randrange(4) == 0:
        data = rng.choice((cut, insert, remove))(rng, data)
    if rng.randrange(10) == 0:
        length = rng.choice((*_WIDE, len(text) - 1, len(text) + 1, len(text) + len(data)))
        return max(0, length).to_bytes(8, "little") + text + data
    return struct.pack("<Q", len(text)) + text + data


# Fields of zip records, (offset, bytes), by signature.
_ZIP_FIELDS = {
    b"PK\x01\x02": ((4, 2), (6, 2), (8, 2), (10, 2), (12, 2), (14, 2), (16, 4), (20, 4), (24, 4),
                    (28, 2), (30, 2), (32, 2), (34, 2), (36, 2), (38, 4), (42, 4)),
    b"PK\x03\x04": ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)),
    b"PK\x05\x06": ((4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
}  # fmt: skip


def zip_record(rng: Random, content: bytes) -> bytes:
    """Changes fields of the central directory, of local headers or of the last record."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        signature = rng.choice((b"PK\x01\x02", b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"))
        starts = [at for at in _found(content, signature)]
        if not starts:
            return content
        start = rng.choice(starts)
        offset, width = rng.choice(_ZIP_FIELDS[signature])
        old = int.from_bytes(content[start + offset : start + offset + width], "little")
        value = rng.choice((rng.choice(_WIDE), old + 1, old - 1, old ^ 1, old * 2, len(content)))
        if rng.randrange(4) == 0:  # what another record has there
            other = rng.choice(starts) + offset
            value = int.from_bytes(content[other : other + width], "little")
        content = _write(content, start + offset, width, value)
    return content


def zip64(rng: Random, content: bytes) -> bytes:
    """Adds the records of a zip64 archive, true ones or not, before the last record."""
    end = content.rfind(b"PK\x05\x06")
    if end < 0:
        return content
    count, size, offset = struct.unpack_from("<H2L", content, end + 10)
    values = [44, 45, 45, 0, 0, count, count, size, offset]
    if rng.randrange(2):
        values[rng.randrange(9)] = rng.choice(_EDGES)
    values[1:3] = (value & 0xFFFF for value in values[1:3])
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", *values)
    where = rng.choice((end, end, 0, len(content), 1 << 63))
    locator = struct.pack("<4sLQL", b"PK\x06\x07", rng.choice((0, 0, 1)), where, 1)
    tail = bytearray(content[end:])
    if rng.randrange(2):
        tail[8:20] = b"\xff" * 12
    return content[:end] + record + locator + bytes(tail)


def _found(content: bytes, signature: bytes):
    at = content.find(signature)
    while at >= 0:
        yield at
        at = content.find(signature, at + 1)


def rezip(rng: Random, members: list[tuple[str, bytes]]) -> bytes:
    """A new archive of members, now and then with a hostile one, another order or method."""
    members = list(members)
    kind = rng.randrange(12)
    if kind == 0 and members:
        members.append(rng.choice(members))
    elif kind == 1:
        odd = ("../evil", "/tmp/evil", "a\0b", "x" * 600, "", "\x1b[2J", "archive/constants.pkl")
        members.append((rng.choice(odd), b"x"))
    elif kind == 2 and members:
        del members[rng.randrange(len(members))]
    elif kind == 3:
        rng.shuffle(members)
    elif kind == 4 and members:
        at = rng.randrange(len(members))
        members[at] = (rng.choice((members[at][0] + "x", "b.txt", "a.npy")), members[at][1])
    elif kind == 5:
        members.append((rng.choice(("z.npy", "archive/z")), b"\0" * rng.choice((1 << 16, 1 << 20))))
    method = zipfile.ZIP_DEFLATED if kind in (5, 6) else zipfile.ZIP_STORED
    method = rng.choice((zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)) if kind == 7 else method
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that occur twice
        with zipfile.ZipFile(buffer, "w", method) as archive:
            for name, content in members:
                archive.writestr(zipfile.ZipInfo(name), content, method)
    return buffer.getvalue()


def _in_member(
    rng: Random,
    content: bytes,
    fits: Callable[[str], bool],
    change: Callable[[Random, bytes], bytes],
) -> bytes:
    """Changes the content of one member and packs the archive again, checksums and all."""
    members = [(info.filename, data) for info, data in fuzz_seeds.members_of(content)]
    at = [k for k, (name, _) in enumerate(members) if fits(name)]
    if at:
        k = rng.choice(at)
        members[k] = (members[k][0], change(rng, members[k][1]))
    return rezip(rng, members)


def npy(rng: Random, content: bytes) -> bytes:
    """Changes the header of a .npy, or its data."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice(BLIND)(rng, content)
    length = struct.unpack_from("<H", content, 8)[0]
    text, data = content[10 : 10 + length].decode("latin1"), content[10 + length :]
    descr = rng.choice(
        ("'<f4'", "'<f8'", "'|O'", "'<U1'", "'V2'", "'|V2'", "'>i8'", "'<c16'", "'|b1'",
         "'<M8[ns]'", "[('a','<f4')]", "('<f4',(2,))", "'<f2'", "None", "3", "'|S0'", "'<f4' * 9",
         "'O'", "'|V0'")
    )  # fmt: skip
    shape = rng.choice(
        ("()", "(0,)", "(1,)", "(2, 3)", "(-1,)", "(4294967296, 4294967296)", "(1,)*99", "2", "[2]",
         "(True,)", "(2.0,)", "(9223372036854775807,)", f"({'1,' * 40})",
         f"({'(' * 60}{')' * 60},)",
         "('a',)", "(None,)", f"({'9' * 5000},)", "(1 << 4,)", "(1j,)", "(0, 1 << 62)")
    )  # fmt: skip
    order = rng.choice(("False", "True", "1", "None"))
    made = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"
    if kind < 3:
        made = rng.choice(BLIND)(rng, text.encode("latin1")).decode("latin1")
    elif kind < 5:
        old = ("'descr'", "'fortran_order'", "'shape'", "False", "True", "}", ",", "'", "(", ")")
        new = ("'descr'", "'shape'", "__import__('os')", "{", "", "(", "'\\x00'", "\\", "#", "-")
        made = text.replace(rng.choice(old), rng.choice(new), 1)
    raw = made.encode("latin1", "replace")
    version = rng.choice(
        (b"\x01\x00", b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x01")
    )
    prefix = struct.pack("<H" if version[0] == 1 else "<L", len(raw) & 0xFFFF)
    return b"\x93NUMPY" + version + prefix + raw + data


def npz(rng: Random, content: bytes) -> bytes:
    """Changes a member of an npz."""
    return _in_member(rng, content, lambda name: name.endswith(".npy"), npy)


def _hostile_opcodes() -> list[bytes]:
    touch = make.text(f"touch {_MARKER}")
    system = make.name("os", "system")
    one = [bytes([k]) for k in range(256)]
    return [
        *one,
        system, system + touch + b"\x85R", make.text("os") + make.text("system") + b"\x93",
        b"(" + touch + b"ios\nsystem\n", b"(" + system + touch + b"o", system + b")\x81",
        system + b")}\x92", b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"Pcpu\n",
        b"}b", b")}\x86b", b"N", b"(", b")", b"]", b"}", b"0", b"1", b"2", b"\x94", b"\x8f",
        b"\x80\x05", b"\x95" + struct.pack("<Q", 1 << 40), b"\x8b" + struct.pack("<i", 1 << 30),
        b"\x8b\xff\xff\xff\xff", b"\x8e" + struct.pack("<Q", 1 << 50),
        b"B" + struct.pack("<I", 1 << 31),
        b"\x96" + struct.pack("<Q", 1 << 50), b"X\xff\xff\xff\xff", b"\x8d" + b"\xff" * 8, b"\x97",
        b"\x98", b"I99999999999999999999\n", b"L" + b"9" * 5000 + b"L\n", b"F1e999\n", b"Fnan\n",
        b"S'x'\n", b"Vx\\ud800\n", b"q\x00", b"r\xff\xff\xff\xff", b"h\x00", b"j\xff\xff\xff\x7f",
        b"p-1\n", b"g0\n", b"U\x01x", b"T\xff\xff\xff\xff", b"K\x01", b"M\xff\xff",
        b"J\xff\xff\xff\xff", b"G" + b"\xff" * 8, b"tQ", b"Q", b"R", b"u", b"s", b"e", b"a",
        b"t", b".",
        make.name("torch", "LongStorage"), make.name("torch", "DoubleStorage"),
        make.name("torch._utils", "_rebuild_tensor_v3"), make.name("torch", "float8_e5m2"),
        make.name("torch._utils", "_rebuild_parameter"), make.name("builtins", "eval"),
        make.name("collections", "OrderedDict") + b")R", make.text("w"), make.text("../x"),
    ]  # fmt: skip


HOSTILE_OPCODES = _hostile_opcodes()


def opcodes(rng: Random, content: bytes) -> bytes:
    """Drops, repeats, swaps, replaces and adds opcodes of a pickle, and changes arguments."""
    try:
        parsed = [(op.name, argument, at) for op, argument, at in pickletools.genops(content)]
    except ValueError:
        return flip(rng, content)
    ends = [at for _, _, at in parsed[1:]] + [len(content)]
    pieces = [content[at:end] for (_, _, at), end in zip(parsed, ends, strict=True)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        k = rng.randrange(len(pieces))
        kind = rng.randrange(9)
        if kind == 0:
            pieces[k] = b""
        elif kind == 1:
            pieces[k] *= rng.choice((2, 2, 3, 1000))
        elif kind == 2:
            other = rng.randrange(len(pieces))
            pieces[k], pieces[other] = pieces[other], pieces[k]
        elif kind == 3:
            pieces[k] = rng.choice(HOSTILE_OPCODES)
        elif kind == 4:
            pieces[k] += rng.choice(HOSTILE_OPCODES)
        elif kind == 5:
            pieces[k] = rng.choice(pieces)
        else:
            pieces[k] = _argument(rng, parsed[k][0], pieces[k]) if k < len(parsed) else pieces[k]
    return b"".join(pieces)


def _argument(rng: Random, name: str, piece: bytes) -> bytes:
    """An opcode with another argument of its kind."""
    if name in ("BININT", "BININT1", "BININT2", "LONG1"):
        return make.number(rng.choice((*_WIDE, -1, -(1 << 40), 6, 24, 1 << 2000)))
    if name == "BINUNICODE":
        odd = (
            "",
            "storage",
            "0",
            "1",
            "../0",
            "w" * 600,
            "a\0b",
            "\x1b[2J",
            "cpu",
            "w",
            "state_dict",
        )
        return make.text(rng.choice(odd))
    if name == "GLOBAL":
        return rng.choice([op for op in HOSTILE_OPCODES if op[:1] == b"c" and len(op) > 1])
    return flip(rng, piece)


def torch_zip(rng: Random, content: bytes) -> bytes:
    """Changes the pickle of a torch archive, now and then a storage."""
    if rng.randrange(10) == 0:
        change = rng.choice((cut, insert, remove))
        return _in_member(rng, content, lambda name: "/data/" in name, change)
    return _in_member(rng, content, lambda name: name.endswith("data.pkl"), opcodes)


def torch_legacy(rng: Random, content: bytes) -> bytes:
    """Changes one of the pickles of torch's older layout, or the counts behind them."""
    stream = io.BytesIO(content)
    starts = [0]
    for _ in range(5):
        for _ in pickletools.genops(stream):
            pass
        starts.append(stream.tell())
    parts = [content[a:b] for a, b in zip(starts, starts[1:], strict=False)]
    data = content[starts[-1] :]
    kind = rng.randrange(12)
    if kind < 8:
        parts[3] = opcodes(rng, parts[3])
    elif kind == 8:
        parts[4] = opcodes(rng, parts[4])
    elif kind == 9:
        keys = rng.choice((["0", "0"], ["1"], [], [0], "0", ["0"] * 9, {"0": 1}, [None]))
        parts[4] = pickle.dumps(keys, protocol=2)
    elif kind == 10:
        k = rng.randrange(3)
        parts[k] = opcodes(rng, parts[k])
    else:
        data = _write(data, 0, 8, rng.choice((*_WIDE, 5, 6, 7)))
    return b"".join(parts) + data


_AWARE: dict[str, tuple[Callable[[Random, bytes], bytes], ...]] = {
    "safetensors": (safetensors,),
    "npz": (npz, zip_record, zip64),
    "torch-zip": (torch_zip, torch_zip, zip_record, zip64),
    "torch-legacy": (torch_legacy,),
}


def _mutate_one(rng: Random, reader: str, content: bytes, others: Sequence[bytes]) -> bytes:
    """One content: two thirds by mutations that know the format, the others blind."""
    kind = rng.randrange(12)
    if kind == 0:
        return splice(rng, content, others)
    if kind < 4:
        for _ in range(rng.choice((1, 1, 2))):
            content = rng.choice(BLIND)(rng, content)
        return content
    content = rng.choice(_AWARE[reader])(rng, content)
    return flip(rng, content) if kind == 4 else content


def mutate(rng: Random, reader: str) -> Files:
    """One mutated file or folder for a reader."""
    files = dict(rng.choice(fuzz_seeds.seeds(reader)))
    if reader in _AWARE:
        others = [other[MAIN] for other in fuzz_seeds.seeds(reader)]
        return {MAIN: _mutate_one(rng, reader, files[MAIN], others)}
    names = sorted(name for name in files if name.endswith(".json") or reader == "shards")
    if reader == "shards" and rng.randrange(2):
        names = [INDEX]
    name = rng.choice(names)
    if not name.endswith(".json"):
        others = [files[other] for other in names if not other.endswith(".json")]
        files[name] = _mutate_one(rng, "safetensors", files[name], others)
        if rng.randrange(20) == 0:
            del files[name]
    elif rng.randrange(4):
        files[name] = json_value(rng, files[name])
    else:
        files[name] = rng.choice(BLIND)(rng, files[name])
    return files

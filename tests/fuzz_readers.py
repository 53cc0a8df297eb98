"""Puts mutated files through the readers of weights, and accepts arrays or a WeightsError alone.

    python tests/fuzz_readers.py --reader=all --count=100000 --seed=0
    python tests/fuzz_readers.py --reader=npz --seed=0 --case=4711       # one case again

A case is made from (seed, reader, number) alone. It fails when it ends in another exception or in
the death of the process, takes more than 2 s of processor time, needs more memory than a bound,
writes or touches a file, imports a module, opens a socket, starts a process or compiles code.
Failures are printed with their numbers, and the exit code is 1.
"""

import argparse
import dataclasses
import hashlib
import json
import mmap
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any

import fuzz_mutations
import fuzz_seeds
import numpy as np
from fuzz_seeds import MAIN, READERS, Files

from jft.errors import WeightsError

CPU_SECONDS = 2.0
STUCK_SECONDS = 60  # of the clock: a worker that waits for something is killed
ADDRESS_BYTES = 512 << 20  # above what the process has before the first case
RESIDENT_BYTES = 192 << 20
_CHUNK = 20_000  # cases a worker process runs at most
_NOT_YET = -1  # in place of a case, while a worker warms up
# What json and pickletools decode text by is imported at first use; all else would be told.
_CODECS = (
    "utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-16-le", "utf-32", "utf-32-be", "utf-32-le",
    "latin-1", "ascii", "cp437", "raw_unicode_escape", "unicode_escape",
)  # fmt: skip
_ARRAYS, _REFUSED = "arrays", "refused"
_WRITES = ("w", "a", "x", "+")
_FORBIDDEN = (
    "import", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn",
    "socket.", "exec", "pickle.", "marshal.", "ctypes.", "os.remove", "os.rename", "os.mkdir",
    "os.rmdir", "os.chmod", "os.chown", "os.link", "os.symlink", "os.truncate", "os.putenv",
    "shutil.", "tempfile.", "urllib.", "webbrowser.", "signal.", "sys.add", "code.__new__",
    "function.__new__", "builtins.input", "cpython.run",
)  # fmt: skip


class _SlowError(BaseException):
    """Raised by the timer; no `except Exception` hides it."""


class _SideEffectError(BaseException):
    """Raised where a reader did what no reader may."""


@dataclasses.dataclass
class Tally:
    """What became of the cases of one reader.

    Attributes:
      counts: by outcome.
      failures: case -> what went wrong.
      digest: sum over the cases of a checksum of their input; equal in equal runs.
      resident_bytes: most memory that the cases added to a process.
      seconds: of the clock.
    """

    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    failures: dict[int, str] = dataclasses.field(default_factory=dict)
    digest: int = 0
    resident_bytes: int = 0
    seconds: float = 0.0

    def add(self, other: "Tally") -> None:
        """Takes in another tally."""
        for name, count in other.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        self.failures |= other.failures
        self.digest = (self.digest + other.digest) & 0xFFFFFFFF
        self.resident_bytes = max(self.resident_bytes, other.resident_bytes)


def make_case(seed: int, reader: str, case: int) -> Files:
    """The input of one case."""
    raw = hashlib.sha256(f"{seed}/{reader}/{case}".encode()).digest()
    return fuzz_mutations.mutate(Random(int.from_bytes(raw[:8], "little")), reader)


def digest_of(files: Files) -> int:
    """A checksum of one input."""
    total = 0
    for name, content in files.items():
        total += zlib.crc32(content, zlib.crc32(name.encode()))
    return total & 0xFFFFFFFF


def _reader(reader: str) -> Callable[[Path], Any]:
    """What reads a folder that holds one input."""
    from jft.weights.readers import read, read_file
    from jft.weights.source import resolve

    if reader in ("safetensors", "npz", "torch-zip", "torch-legacy"):
        return lambda folder: read_file(folder / MAIN)
    if reader == "shards":
        return lambda folder: read(resolve(f"file:{folder}"))

    from jft.models.zoo import FAMILIES, make_model
    from jft.weights.agreement import check_card, stated_fields
    from jft.weights.preprocessing import source_preprocess

    own = make_model(name="vit_tiny", num_classes=2).preprocess

    tables = [(family, table) for family in FAMILIES.values() for table in family.tables]

    def configs(folder: Path) -> dict[str, Any]:
        """All that is made of the JSON files beside weights; one family that takes it is enough."""
        found, refusals = resolve(f"file:{folder}"), []
        for family, table in tables:
            try:
                stated_fields(family, found, table)
            except WeightsError as error:
                refusals.append(error)
        source_preprocess(found, own)
        check_card(found, "0" * 64)
        if len(refusals) == len(tables):
            raise refusals[0]
        return {}

    return configs


def _touch(found: Any) -> None:
    """Reads every byte of what was read: a view beyond the file would end the process here."""
    for name, array in found.items():
        if type(name) is not str or type(array) is not np.ndarray or array.dtype.hasobject:
            raise TypeError(f"{name!r} is a {type(array).__name__}, not an array of numbers")
        zlib.crc32(np.ascontiguousarray(array).view(np.uint8).ravel() if array.size else b"")


class Judge:
    """Runs cases in this process, whose memory, time and side effects it watches from then on."""

    def __init__(
        self, read: Callable[[Path], Any], good: Iterable[Files], warm_up: Iterable[Files]
    ) -> None:
        """Warms up, then sets the limits.

        Args:
          read: takes the folder that holds one input.
          good: inputs that must be read.
          warm_up: inputs of which some are refused, so that what only a refusal needs is imported.
        """
        self.read = read
        base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.root = Path(tempfile.mkdtemp(prefix="jft-fuzz-", dir=base))
        self.armed = False
        warnings.simplefilter("error")
        for codec in _CODECS:
            "".encode(codec)
        for files in good:
            folder = self._write(files)
            _touch(self.read(folder))
        for files in warm_up:
            try:
                self.read(self._write(files))
            except Exception:
                continue
        sys.addaudithook(self._audit)
        signal.signal(signal.SIGPROF, self._late)
        self.resident = _resident_bytes()
        limit = _address_bytes() + ADDRESS_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def close(self) -> None:
        """Removes the folder of the cases."""
        shutil.rmtree(self.root, ignore_errors=True)

    def run(self, files: Files) -> tuple[str, str]:
        """(outcome, what was wrong or refused) of one input."""
        folder = self._write(files)
        before = _globals()
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        self.armed = True
        try:
            found = self.read(folder)
            _touch(found)
            outcome, why = _ARRAYS, ""
        except WeightsError as error:
            outcome, why = _REFUSED, str(error)
            if "\n" in why or not why.isprintable() or len(why) > 2_000:
                outcome, why = "failed", f"a message that is no short line of text: {why[:300]!r}"
        except _SlowError:
            outcome, why = "failed", f"took more than {CPU_SECONDS} s"
        except BaseException as error:
            outcome, why = "failed", f"{type(error).__name__}: {str(error)[:300]}"
        finally:
            self.armed = False
            signal.setitimer(signal.ITIMER_PROF, 0)
        found = None
        return self._checked(files, folder, before, outcome, why)

    def _checked(
        self, files: Files, folder: Path, before: Any, outcome: str, why: str
    ) -> tuple[str, str]:
        if _globals() != before:
            return "failed", f"global state changed: {before} -> {_globals()}"
        if set(os.listdir(folder)) != set(files) or os.listdir(self.root) != [folder.name]:
            return "failed", f"files changed: {sorted(os.listdir(folder))}"
        if os.path.exists(fuzz_mutations._MARKER):
            return "failed", "code of the file was run"
        grown = _resident_bytes() - self.resident
        if grown > RESIDENT_BYTES:
            self.resident += grown
            return "failed", f"memory grew by {grown >> 20} MiB"
        return outcome, why

    def _write(self, files: Files) -> Path:
        folder = self.root / "case"
        if folder.exists():
            for name in os.listdir(folder):
                os.unlink(folder / name)
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            with open(folder / name, "wb") as file:
                file.write(content)
        return folder

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event == "open":
            _, mode, flags = arguments
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            if not any(c in str(mode or "") for c in _WRITES) and not (flags or 0) & writes:
                return
        elif not event.startswith(_FORBIDDEN):
            return
        raise _SideEffectError(f"{event} {str(arguments)[:200]}")

    def _late(self, *_: Any) -> None:
        if self.armed:
            raise _SlowError


def _judge(reader: str) -> Judge:
    warm_up = (make_case(-1, reader, case) for case in range(300))
    return Judge(_reader(reader), fuzz_seeds.seeds(reader), warm_up)


def _globals() -> tuple[Any, ...]:
    return (
        len(sys.modules), len(warnings.filters), os.getcwd(), len(os.environ),
        sys.getrecursionlimit(), tuple(np.geterr().values()),
    )  # fmt: skip


def _resident_bytes() -> int:
    # getrusage's figure would start from that of the process before exec.
    with open("/proc/self/status", "rb", buffering=0) as file:
        status = file.read(4096)
    return int(status[status.index(b"VmHWM:") + 6 :].split(None, 1)[0]) << 10


def _address_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def work(reader: str, seed: int, start: int, stop: int, progress: str) -> Tally:
    """Runs cases [start, stop) in this process; the number of each is in `progress` first."""
    judge = _judge(reader)
    tally = Tally()
    try:
        with open(progress, "r+b") as file, mmap.mmap(file.fileno(), 8) as shared:
            for case in range(start, stop):
                shared[:] = struct.pack("<q", case)
                files = make_case(seed, reader, case)
                outcome, why = judge.run(files)
                tally.counts[outcome] = tally.counts.get(outcome, 0) + 1
                tally.digest = (tally.digest + digest_of(files)) & 0xFFFFFFFF
                if outcome == "failed":
                    tally.failures[case] = why
        tally.resident_bytes = max(0, _resident_bytes() - judge.resident)
    finally:
        judge.close()
    return tally


class _Worker:
    """A process that runs a range of cases, and is started again behind a case that ends it."""

    def __init__(self, reader: str, seed: int, start: int, stop: int, folder: Path) -> None:
        self.reader, self.seed, self.start, self.stop = reader, seed, start, stop
        self.progress = folder / f"{reader}-{start}"
        self.tally = Tally()
        self._launch()

    def _launch(self) -> None:
        self.progress.write_bytes(struct.pack("<q", _NOT_YET))
        words = [sys.executable, __file__, "--worker", str(self.progress), "--reader", self.reader]
        words += ["--seed", str(self.seed), "--start", str(self.start), "--stop", str(self.stop)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.seen, self.since = self.start, time.monotonic()

    def done(self) -> bool:
        """Looks after the process; True when its range is through."""
        code = self.process.poll()
        (at,) = struct.unpack("<q", self.progress.read_bytes())
        if code is None:
            if at != self.seen:
                self.seen, self.since = at, time.monotonic()
            if time.monotonic() - self.since < STUCK_SECONDS:
                return False
            self.process.kill()
        out, err = self.process.communicate()
        if code == 0:
            self.tally.add(_tally_from(json.loads(out)))
            return True
        last = err.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        if at == _NOT_YET:
            raise RuntimeError(f"{self.reader}: good files are not read: {last[0]}")
        ended = "stuck, killed" if code is None else f"the process ended with {code}"
        # Cases before it were through; their outcomes went with the process.
        why = f"{ended}: {last[0][:300]}"
        self.tally.add(Tally({"failed": 1, "lost": at - self.start}, {at: why}))
        self.start = at + 1
        if self.start >= self.stop:
            return True
        self._launch()
        return False


def _tally_from(content: dict[str, Any]) -> Tally:
    content["failures"] = {int(case): why for case, why in content["failures"].items()}
    return Tally(**content)


def fuzz(reader: str, count: int, seed: int, jobs: int) -> Tally:
    """Runs cases 0 to count - 1 of one reader in worker processes."""
    begun, total = time.monotonic(), Tally()
    folder = Path(tempfile.mkdtemp(prefix="jft-fuzz-progress-"))
    chunk = max(1, min(-(-count // jobs), _CHUNK))
    ranges = [(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    active: list[_Worker] = []
    try:
        while ranges or active:
            while ranges and len(active) < jobs:
                active.append(_Worker(reader, seed, *ranges.pop(0), folder))
            time.sleep(0.05)
            for worker in [worker for worker in active if worker.done()]:
                active.remove(worker)
                total.add(worker.tally)
    finally:
        for worker in active:
            worker.process.kill()
            worker.process.wait()
        shutil.rmtree(folder, ignore_errors=True)
    total.seconds = time.monotonic() - begun
    return total


def report(reader: str, tally: Tally, seed: int) -> str:
    """One line on a reader, and one a failure (the first twenty)."""
    cases = sum(tally.counts.values())
    lines = [
        f"{reader:<13}{cases:>9,} cases{tally.counts.get(_ARRAYS, 0):>9,} read"
        f"{tally.counts.get(_REFUSED, 0):>9,} refused{len(tally.failures):>6} failed"
        f"{cases / max(tally.seconds, 1e-9):>9,.0f}/s{tally.resident_bytes >> 20:>5} MiB"
        f"   inputs {tally.digest:08x}"
    ]
    for case, why in sorted(tally.failures.items())[:20]:
        lines.append(f"  --reader={reader} --seed={seed} --case={case}: {why}")
    return "\n".join(lines)


def replay(reader: str, seed: int, case: int, keep: str | None) -> int:
    """Runs one case here and says what became of it; its files stay in the folder `keep`."""
    files = make_case(seed, reader, case)
    if keep:
        Path(keep).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (Path(keep) / name).write_bytes(content)
    judge = _judge(reader)
    try:
        outcome, why = judge.run(files)
    finally:
        judge.close()
    print(f"{reader} case {case} of seed {seed}: {outcome} {why}")
    return int(outcome == "failed")


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reader", default="all", choices=("all", *READERS))
    parser.add_argument("--count", type=int, default=100_000, help="cases a reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="runs this one alone")
    parser.add_argument("--keep", help="with --case: a folder for the files of the case")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    for name in ("--worker", "--start", "--stop"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        tally = work(args.reader, args.seed, int(args.start), int(args.stop), args.worker)
        print(json.dumps(dataclasses.asdict(tally)))
        return 0
    readers = READERS if args.reader == "all" else (args.reader,)
    if args.case is not None:
        if len(readers) != 1:
            parser.error("--case needs one --reader")
        return replay(readers[0], args.seed, args.case, args.keep)
    failed = False
    for reader in readers:
        tally = fuzz(reader, args.count, args.seed, args.jobs)
        print(report(reader, tally, args.seed), flush=True)
        failed |= bool(tally.failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""One writer per run directory: `lock.json` says who, a POSIX record lock on it says whether.

The record lock ends with its process however that dies, so a stale lock needs no guessing, and
forked data workers do not inherit it. The JSON (pid, host, start time) is for the message, and for
file systems that do not keep locks. On network file systems record locks must be enabled (NFSv4
has them; a mount with `nolock` does not): without them two hosts cannot see each other.
"""

import atexit
import fcntl
import json
import logging
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from jft.errors import ConfigError

log = logging.getLogger(__name__)

_held: set[str] = set()  # a record lock does not keep a process from locking twice itself


def process_start(pid: int) -> str | None:
    """Returns a text that no other process with this pid has on this host; None if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        fields = stat.rpartition(")")[2].split()  # the name before may hold spaces
        if fields[0] in "ZX":
            return None
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{fields[19]}"  # starttime, ticks since boot: proc(5)
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except OSError:
        pass
    found = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


class Lock:
    """Holds a run directory for this process; a context manager.

    Raises:
      ConfigError: a live process holds it; the message names its pid and host.
    """

    def __init__(self, workdir: Path | str):
        """Takes the lock, making `workdir` if it is missing."""
        folder = Path(workdir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = folder.resolve() / "lock.json"
            self._handle: int | None = self._take()
        except OSError as error:
            raise ConfigError(f"workdir {folder} cannot be locked: {error.strerror}") from error
        self._pid = os.getpid()
        _held.add(str(self.file))
        atexit.register(self.release)

    def __enter__(self) -> "Lock":
        """Returns itself."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Releases the lock."""
        self.release()

    def release(self) -> None:
        """Gives the directory free; may be called again."""
        if self._handle is None or os.getpid() != self._pid:
            return
        atexit.unregister(self.release)
        self.file.unlink(missing_ok=True)  # before the lock ends: nobody else's file can be there
        os.close(self._handle)
        self._handle = None
        _held.discard(str(self.file))

    def _take(self) -> int:
        if str(self.file) in _held:
            raise self._refusal({"pid": os.getpid(), "host": socket.gethostname()})
        while True:
            # Created without O_EXCL: which of two creators owns it is for the record lock to say.
            handle = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                locked = self._record_lock(handle)
                if locked and not self._still_there(handle):  # released between open and lock
                    os.close(handle)
                    continue
                owner = self._owner(handle)
                if not locked and not owner:  # locked a moment ago, not signed yet
                    time.sleep(0.1)
                    owner = self._owner(handle)
                if not locked or self._alive(owner):
                    raise self._refusal(owner)
                if owner:
                    log.warning(
                        "workdir %s: lock taken over from process %s on host %s, which has ended",
                        self.file.parent,
                        owner.get("pid"),
                        owner.get("host"),
                    )
                self._sign(handle)
                return handle
            except BaseException:
                os.close(handle)
                raise

    @staticmethod
    def _record_lock(handle: int) -> bool:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:  # ENOLCK, ENOTSUP: then the JSON alone decides
            log.warning("this file system keeps no locks (%s): never run two hosts", error.strerror)
            return True

    @staticmethod
    def _owner(handle: int) -> dict[str, Any]:
        try:
            owner = json.loads(os.pread(handle, 4096, 0))
        except ValueError:
            return {}
        return owner if isinstance(owner, dict) else {}

    @staticmethod
    def _alive(owner: dict[str, Any]) -> bool:
        """True when the owner runs on this host; another host's is judged by the record lock."""
        pid, start = owner.get("pid"), owner.get("start")
        if owner.get("host") != socket.gethostname() or not isinstance(pid, int) or start is None:
            return False
        return process_start(pid) == start

    def _still_there(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self.file))
        except FileNotFoundError:
            return False

    @staticmethod
    def _sign(handle: int) -> None:
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "start": process_start(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        text = json.dumps(owner).encode()
        os.pwrite(handle, text, 0)
        os.ftruncate(handle, len(text))

    def _refusal(self, owner: dict[str, Any]) -> ConfigError:
        since = f" since {owner['since']}" if "since" in owner else ""
        return ConfigError(
            f"workdir {self.file.parent} is in use by process {owner.get('pid', '?')} on host"
            f" {owner.get('host', '?')}{since}: wait for it, stop it, or take another workdir"
        )

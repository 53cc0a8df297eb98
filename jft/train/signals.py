"""SIGTERM and Ctrl-C end a run politely: the step finishes, the loop saves, the exit code tells.

A second signal ends the process at once, without saving.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}  # 75: EX_TEMPFAIL, "run the same line again"


class StopSignals:
    """Context manager that turns the first SIGTERM or SIGINT into a flag.

    Outside the main thread, where Python cannot set handlers, it does nothing. With several
    processes each sees its own signals only: the loop must agree on the step to stop at.

    Attributes:
      signal: the signal received, or None.
    """

    def __init__(self) -> None:
        """Installs nothing yet."""
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int | None:
        """75 after SIGTERM, 130 after SIGINT, None while nothing came."""
        return None if self.signal is None else EXIT_CODES[self.signal]

    def __bool__(self) -> bool:
        """True once the run should stop."""
        return self.signal is not None

    def __enter__(self) -> "StopSignals":
        """Installs the handlers."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in EXIT_CODES}
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Puts the handlers from before back."""
        for number, handler in self._before.items():
            # None: the handler was not installed from Python, and cannot be put back by it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal is not None:
            _say(f"jft: second {signal.Signals(number).name}: stopping at once, nothing saved\n")
            # 75 would say that a save has been made: 128 + number is what a shell shows for
            # a process that the signal killed (143, 130).
            os._exit(128 + number)
        self.signal = signal.Signals(number)
        _say(f"jft: {self.signal.name}: finishing this step, then saving (again: stop at once)\n")


def _say(text: str) -> None:
    """Writes to stderr without its buffer, which the interrupted code may be holding."""
    try:
        os.write(2, text.encode())
    except OSError:
        pass

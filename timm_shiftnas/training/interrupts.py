"""SIGTERM during a run."""
from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ['Interrupts', 'Terminated']


class Terminated(Exception):
    """SIGTERM was received, and the run has stopped where it can be resumed."""


class Interrupts:
    """Handles SIGTERM while it is entered: the run stops after the current update, or at once in `immediate()`.

    A second SIGTERM ends the process. Ctrl-C stays Python's `KeyboardInterrupt`.

    Attributes:
        received: Whether this process has received SIGTERM.
        stopping: Whether any process has; all processes agree on it (see `Update`).
    """

    def __init__(self) -> None:
        self.received = self.stopping = False
        self._immediate = False

    def __enter__(self) -> Interrupts:
        self._handler_before = signal.signal(signal.SIGTERM, self.terminate)
        return self

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGTERM, self._handler_before)

    def terminate(self, *_: Any) -> None:
        """Handle SIGTERM."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.received = True
        if self._immediate:
            raise Terminated

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Stop at once in this block, whose work a resumed run repeats."""
        self._immediate = True
        try:
            if self.received:
                raise Terminated
            yield
        finally:
            self._immediate = False

"""Handling of Ctrl-C: one line and exit code 130, never a traceback. Imports nothing that takes long."""
from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ['CtrlC']


class CtrlC:
    """Handles Ctrl-C from its creation to the end of the process.

    While modules are imported and while the interpreter shuts down, it ends the process at once: there is nothing to
    clean up. In the block `raised`, it raises `KeyboardInterrupt` the first time. Where a program ignores Ctrl-C, such
    as in background jobs of a shell, it stays ignored.

    Args:
        prog: Name of the program in the line.
    """

    def __init__(self, prog: str) -> None:
        self.prog, self.process = prog, os.getpid()
        self.raises = False
        if threading.current_thread() is threading.main_thread():
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
                signal.signal(signal.SIGINT, self.handle)

    def handle(self, *_: Any) -> None:
        """Handle SIGINT."""
        if os.getpid() != self.process:  # the terminal interrupts worker processes too: the first process ends them
            return
        if self.raises:
            self.raises = False
            raise KeyboardInterrupt
        os.write(2, f'{self.prog}: interrupted\n'.encode())
        os._exit(130)

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Raise `KeyboardInterrupt` in this block, once. If it is not caught there, the program ends with one line."""
        self.raises = True
        sys.unraisablehook, hook = self.handle_unraisable, sys.unraisablehook
        try:
            yield
        except BaseException as error:
            if not is_interrupt(error):
                raise
            print(f'{self.prog}: interrupted', file=sys.stderr)
            sys.exit(130)
        finally:
            self.raises = False
            sys.unraisablehook = hook

    def handle_unraisable(self, error: Any) -> None:
        """Raise again an interrupt that arrived in a finalizer; Python would print and forget it."""
        if error.exc_type is KeyboardInterrupt:
            self.raises = True
            threading.Timer(.01, os.kill, (self.process, signal.SIGINT)).start()
        else:
            sys.__unraisablehook__(error)


def is_interrupt(error: BaseException | None) -> bool:
    """Whether an error is Ctrl-C, or was raised on top of it: torch's writer raises a `RuntimeError` there."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None

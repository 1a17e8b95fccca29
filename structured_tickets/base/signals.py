"""Handlers of signals, where a process may have them: only its main thread can set any."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)

Handler = Callable[[int, FrameType | None], Any]


def handle(numbers: Iterable[int], handler: Handler) -> dict[int, Any]:
    """Set a handler of signals; return those before, for `restore`.

    In another thread than the main one (web servers, notebooks' background tasks) nothing is set, and nothing returned:
    the program around the thread keeps its own handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in numbers}


def restore(before: Mapping[int, Any]) -> None:
    """Set the handlers again that `handle` returned."""
    for number, handler in before.items():
        # None: a program around Python has set it, and Python cannot set it again.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)

"""The ways a run can end badly, each with the exit status that a shell sees.

0 finished, 1 a bug, 2 usage, 3 data or weights missing, 4 loss not finite, 5 cannot write, 6 another process of the run
is gone, 130 Ctrl-C, 143 SIGTERM.
"""


class RunError(Exception):
    """An end of the run that the user can act on: one line, no traceback.

    Args:
        output: What the program had found until then, to be printed before the line.
    """

    exit_code = 1
    shared = False
    """True if rank 0 reports this error for all ranks."""

    alike = False
    """True if every rank raises this error on its own, possibly at different times."""

    def __init__(self, message: str = "", *, output: str = "") -> None:
        super().__init__(message)
        self.output = output


class UsageError(RunError):
    """A flag, or a combination of flags, that makes no sense."""

    exit_code = 2
    shared = alike = True


class BadValue(UsageError, ValueError):
    """An argument of the Python interface whose value makes no sense."""


class BadType(UsageError, TypeError):
    """An argument of the Python interface that is of the wrong type."""


class BadCall(UsageError, RuntimeError):
    """A function of the Python interface that is called when it cannot do its work."""


class MachineError(UsageError):
    """A flag that makes no sense on this machine; on another process's machine it may."""

    shared = alike = False


class DataError(RunError):
    """Data or weights that are not where they should be, or cannot be read."""

    exit_code = 3


class DivergedError(RunError):
    """The loss stopped being a finite number."""

    exit_code = 4
    shared = alike = True


class StorageError(RunError):
    """The run folder cannot be written (disk full, read-only)."""

    exit_code = 5


class PeerLostError(RunError):
    """Another process of the same run (under torchrun) has ended, or cannot be reached."""

    exit_code = 6
    shared = True


class Interrupted(RunError):
    """A signal asked the run to stop; its state is saved."""

    shared = True

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def first_line(error: BaseException) -> str:
    """The first thing that an error of somebody else's code says; its name, if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]

"""A job that does nothing, in a module that is imported at once."""


def nothing(task):
    """In place of `sweeps.job_process._child`."""

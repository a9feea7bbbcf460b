"""The two kinds of failure a run can end with."""

__all__ = ["RunError"]


class RunError(RuntimeError):
    """The machine's fault, not the user's: a full disk, a broken file. The run folder stays intact; exit code 1.

    What a user can mend by another argument is a ValueError; exit code 2.
    """

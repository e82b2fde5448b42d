"""The exceptions that a user is meant to read."""


class UserError(ValueError):
    """A mistake that the user can mend.

    The message is one line that names the culprit and the remedy; the command line prints it
    without a traceback and exits with status 1. Everything else that is raised is a defect of this
    package and keeps its traceback.
    """


class CannotWrite(UserError):
    """A file that could not be written, with a library's threads still at it perhaps."""


class OutOfMemory(UserError):
    """A program that does not fit the devices' memory, or the host's."""


def one_line(error: object, limit: int | None = None) -> str:
    """Return the text of an error (or of anything) as one line, of at most `limit` characters."""
    return " ".join(str(error).split())[:limit]

"""The ways the agent's work ends early; mistakes a user can mend are `fedpipe_api.base.UserError`."""


class Stopped(BaseException):
    """SIGTERM or SIGINT arrived: leave quickly, exit 0. Not an Exception, so that no handler swallows it."""


class Aborted(Exception):
    """The coordinator no longer wants the present work: its round is closed."""


class Refused(Exception):
    """The coordinator answered 4xx."""

    def __init__(self, status: int, reason: str, error: str):
        super().__init__(f"coordinator refused ({status} {reason}): {error}")
        self.status = status
        self.reason = reason


class Failure(Exception):
    """A failure that one line explains: the agent reports it and exits 1 without a traceback."""

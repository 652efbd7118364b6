"""The commands, and how they speak of a user's mistakes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """A ValueError met while setting up: shown as one line, without a traceback."""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Around set-up: turns ValueErrors, which are the user's to mend, into one line and exit code 2."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error

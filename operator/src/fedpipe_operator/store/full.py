# SPDX-License-Identifier: Apache-2.0
"""When the volume has no room."""

import errno
import sqlite3


def is_full(error: BaseException) -> bool:
    """Whether the error says that the volume, or the quota on it, has no room."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, sqlite3.OperationalError) and (
        getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
    )

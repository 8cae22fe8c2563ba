"""One study in a folder at a time."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastgpt.errors import UserError

log = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """The right to carry out a study in a folder, which is made; a descriptor that has it as long as one has it open.

    A run of the study that is given the descriptor keeps the right when the study itself is killed: what starts the
    study again would start the same runs beside those that go on.

    Raises:
        UserError: somebody has the right.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: a study is carried out in it, or runs of one that was killed go on; wait for them, or "
                "choose another 'out'"
            ) from None
        except OSError as problem:
            log.warning("%s: cannot be locked against other studies (%s)", folder, problem.strerror)
        yield handle
    finally:
        os.close(handle)

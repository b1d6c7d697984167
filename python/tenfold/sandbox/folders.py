# SPDX-License-Identifier: Apache-2.0
"""Removes what a program left behind, however deep, wide and locked it is."""

from __future__ import annotations

import contextlib
import os
import threading

_PATIENCE = 2.0  # seconds; some file systems remove a few hundred folders a second


def remove(folder: str) -> None:
    """Removes a folder in which nothing runs any more; what cannot be removed stays.

    ``shutil.rmtree`` needs a stack frame and a descriptor per level, and a program may make thousands. What takes
    longer than ``_PATIENCE`` goes on in a thread: nobody waits because a program made many folders.
    """
    try:
        os.rmdir(folder)  # a memory file system leaves nothing
    except OSError:
        thread = threading.Thread(
            target=_remove, args=(folder,), name="sandbox-remove", daemon=True
        )
        thread.start()
        thread.join(_PATIENCE)


def _empty(folder: int) -> list[str]:
    """Removes what is no folder; the names of folders. ``folder`` is a descriptor."""
    inner = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                inner.append(entry.name)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(entry.name, dir_fd=folder)
    return inner


def _remove(folder: str) -> None:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.suppress(OSError):
        here = os.open(folder, flags)
        try:
            left = [_empty(here)]  # of each level, down to here: folders that are still there
            while True:
                if left[-1]:
                    try:
                        os.chmod(left[-1][-1], 0o700, dir_fd=here)
                        below = os.open(left[-1][-1], flags, dir_fd=here)
                    except OSError:
                        left[-1].pop()
                        continue
                    os.close(here)
                    here = below
                    left.append(_empty(here))
                    continue
                left.pop()
                if not left:
                    break
                above = os.open("..", flags, dir_fd=here)
                os.close(here)
                here = above
                with contextlib.suppress(OSError):
                    os.rmdir(left[-1].pop(), dir_fd=here)
        finally:
            os.close(here)
        os.rmdir(folder)

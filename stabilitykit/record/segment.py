"""One open file of the log: appended with single writes, a short one rolled back, closed in forked children."""

from __future__ import annotations

import errno
import fcntl
import os
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

WRITEBACK_BYTES = 4 << 20  # 100 steps of 400 tensors: the longest stall is 10 ms instead of 38, the mean 50 us for 70


class Segment:
    """A new log file that this process alone appends to.

    The kernel lock on it lasts as long as the writer lives, however it ends: whoever can take the lock
    (`is_live`) knows that no more frames will come.

    Attributes:
        path: the file.
        size: bytes it holds.
        num_frames: frames it holds, kept by the recorder.
        torn: nothing should be appended any more: a failed write could not be undone, or the file has been deleted.
    """

    _descriptor = -1

    def __init__(self, path: Path) -> None:
        """Create the file.

        Raises:
            FileExistsError: another writer has this number, or a compactor looked at the file before it was locked.
            OSError: the file cannot be created.
        """
        self.path = path
        self.size = 0
        self.num_frames = 0
        self.torn = False
        self._announced = 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        _OPEN.add(self)
        if take_lock(self._descriptor) is False:
            self.close()
            raise FileExistsError(errno.EEXIST, "another process holds the lock", path.name)

    def __del__(self) -> None:
        self.close()  # a recorder that nobody closed must not keep the lock

    def append(self, buffers: Sequence[bytes]) -> None:
        """Write `buffers` in one system call, or leave the file as it was.

        Raises:
            OSError: they are not in the file, most often because the disk is full.
        """
        length = sum(map(len, buffers))
        written = os.writev(self._descriptor, buffers)
        if written != length:  # a full disk is a short count, not an error
            self._cut(written)
            reason = f"{os.strerror(errno.ENOSPC)}, wrote {written:,} of {length:,} bytes"
            raise OSError(errno.ENOSPC, reason, self.path.name)
        self.size += length
        if self.size - self._announced >= WRITEBACK_BYTES:
            self._start_writeback()

    def sync(self) -> None:
        """Wait until what was written survives a power cut.

        Raises:
            OSError: the disk says it does not.
        """
        os.fdatasync(self._descriptor)

    def check_presence(self) -> None:
        """See to it that the file still has a name: the kernel takes writes to a deleted one without a word.

        Raises:
            FileNotFoundError: it has been deleted, and what was written went with it.
        """
        if not os.fstat(self._descriptor).st_nlink:
            self.torn = True
            reason = f"the log has been deleted, with the {self.num_frames:,} frames it held"
            raise FileNotFoundError(errno.ENOENT, reason, self.path.name)

    def close(self) -> None:
        """Give back the descriptor and the lock; harmless when repeated."""
        _OPEN.discard(self)
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with suppress(OSError):
                os.close(descriptor)

    def _start_writeback(self) -> None:
        """Have the disk begin without waiting for it (on Linux this advice does), so that `sync` finds little to do."""
        os.posix_fadvise(self._descriptor, self._announced, self.size - self._announced, os.POSIX_FADV_DONTNEED)
        self._announced = self.size

    def _cut(self, torn_bytes: int) -> None:
        try:
            os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - torn_bytes)
        except OSError:
            self.torn = True


def take_lock(descriptor: int) -> bool | None:
    """Lock a segment, as its writer or as its compactor, until the descriptor is closed.

    Returns:
        False: its writer lives, or a compactor is at it. None: the file system has no locks; only `compact --all`
        would have needed it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_live(descriptor: int) -> bool:
    """Whether the writer of the segment behind `descriptor`, which holds no lock itself, is still there."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


_OPEN: weakref.WeakSet[Segment] = weakref.WeakSet()


def _close_inherited() -> None:
    """A child that kept the descriptor would hold the lock beyond its parent's death."""
    for segment in list(_OPEN):
        segment.close()


os.register_at_fork(after_in_child=_close_inherited)

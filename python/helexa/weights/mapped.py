"""A file of weights mapped into memory: the one mapping, read ahead of use and released behind it."""

import mmap
import os
import stat
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from helexa.errors import InvalidFile

ByteRange = tuple[int, int, int]  # descriptor, offset, number of bytes


def joined_ranges(found: Iterable[Sequence[ByteRange] | None]) -> list[ByteRange] | None:
    """The ranges of several pieces, in order; None if a piece lies in no file."""
    ranges: list[ByteRange] = []
    for piece in found:
        if piece is None:
            return None
        ranges += piece
    return ranges


def map_regular(path: Path, kind: str) -> tuple[mmap.mmap, int]:
    """A mapping and a descriptor of a non-empty regular file; InvalidFile for anything else."""
    try:
        # Without O_NONBLOCK opening a named pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise InvalidFile(f"{path}: cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    try:
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and status.st_size:
            return mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ), descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    found = "an empty file" if stat.S_ISREG(status.st_mode) else "a directory or device"
    raise InvalidFile(f"{path}: found {found}, expected a {kind} file")


class MappedFile:
    """An open file. It stays readable when its path is deleted or replaced."""

    def __init__(self, path: Path, kind: str):
        """kind: what messages call the file. Raises InvalidFile."""
        self.path = path
        mapped, self._descriptor = map_regular(path, kind)
        self._close_descriptor = weakref.finalize(self, os.close, self._descriptor)
        self._map: mmap.mmap | None = mapped
        self.nbytes = len(mapped)

    def view(self, offset: int, nbytes: int, what: str) -> memoryview:
        """A range of the file, read-only and not copied; it stays valid after close().

        Raises ValueError once closed, InvalidFile, which names `what`, if the file has been cut.
        """
        mapped, end = self.open_map(), offset + nbytes
        size = mapped.size()
        if size < end:  # touching the mapping there would kill the process
            found = f"a file cut to {size} bytes while open"
            raise InvalidFile(f"{self.path.name}: found {found}, expected {what} up to byte {end}")
        return memoryview(mapped)[offset:end]

    def byte_range(self, offset: int, nbytes: int) -> ByteRange:
        """A range of the file for who reads it past the mapping, while it is open; ValueError once closed.

        That is much faster than copying from a view, whose every page the system maps first.
        """
        self.open_map()
        return self._descriptor, offset, nbytes

    def prefetch(self, offset: int, nbytes: int) -> None:
        """Asks the system to read a range of the file soon; does not wait. ValueError once closed."""
        mapped = self.open_map()
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        end = min(offset + nbytes, self.nbytes)
        if start < end:
            mapped.madvise(mmap.MADV_WILLNEED, start, end - start)

    def release(self, offset: int, nbytes: int) -> None:
        """Takes a range's pages out of this process; reading them again only takes time.

        A page that the range begins but does not end stays, so ranges in file order release each page once.
        Raises ValueError once closed.
        """
        mapped = self.open_map()
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        end = min(offset + nbytes, self.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if start < end:
            mapped.madvise(mmap.MADV_DONTNEED, start, end - start)

    def close(self) -> None:
        """Closes the file; what a view refers to lives as long as the view. May be called again."""
        mapped, self._map = self._map, None
        if mapped is not None:
            self._close_descriptor()
            with suppress(BufferError):  # a view is alive; the mapping goes with the last of them
                mapped.close()

    def open_map(self) -> mmap.mmap:
        """The mapping; ValueError once closed."""
        if self._map is None:
            raise ValueError(f"{self.path.name} is closed")
        return self._map

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

"""What all files of weights have in common."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from helexa.weights.gguf import TensorInfo
from helexa.weights.mapped import ByteRange


class TensorFile(Protocol):
    """A model's tensors by GGUF's names and in its conventions: a GGUF file, or a checkpoint seen as one."""

    @property
    def path(self) -> Path: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def data(self, name: str) -> memoryview:
        """All bytes of a tensor."""

    def rows(self, name: str, first: int, end: int) -> memoryview:
        """The bytes of some rows of a tensor; stacked matrices are one."""

    def row_ranges(self, name: str, first: int, end: int) -> Sequence[ByteRange] | None:
        """Where the bytes of some rows lie in files, in order; None for rows that lie in none."""

    def floats_of(self, name: str) -> "TensorFile | None":
        """The file with the floats that a tensor is quantized from; None for a tensor as it stands."""

    def prefetch(self, offset: int, nbytes: int) -> None:
        """Asks the system to read a range, by TensorInfo.offset, soon; does not wait."""

    def release_rows(self, name: str, first: int, end: int) -> None:
        """Says that some rows have been read."""

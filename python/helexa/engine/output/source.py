"""Text that arrives in pieces, for readers that are written as if all of it were there.

A reader is a generator. It looks at characters by their distance from where it stands and yields whenever
it needs one that has not arrived; what it decides depends on characters alone, never on how the text was
cut into pieces.
"""

import re
from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")
Read = Generator[None, None, T]

WHITESPACE = " \t\r\n"


class Source:
    """A window over the text: from the first mark, or from where the reader stands, to what has arrived."""

    def __init__(self, text: str = "", *, ended: bool = False):
        self.ended = ended
        self.truncated = False  # the text was cut off, so what is open must not be closed for it
        self._text = text
        self._place = 0
        self._marks: list[int] = []

    @property
    def is_cut_off(self) -> bool:
        """Whether the reader stands where the text was cut off."""
        return self.truncated and self._place >= len(self._text)

    def append(self, text: str) -> None:
        start = self._marks[0] if self._marks else self._place
        self._text = self._text[start:] + text
        self._place -= start
        self._marks = [mark - start for mark in self._marks]

    def mark(self) -> int:
        """Keeps the text from here on, until the mark of the returned number is released or gone back to."""
        self._marks.append(self._place)
        return len(self._marks)

    def release(self, mark: int = 1) -> None:
        """Forgets the mark and later ones; without a number, all."""
        del self._marks[mark - 1 :]

    def rewind(self, mark: int) -> None:
        """Goes back to the mark and releases it."""
        self._place = self._marks[mark - 1]
        self.release(mark)

    def since(self, mark: int) -> str:
        """The text between the mark and here."""
        return self._text[self._marks[mark - 1] : self._place]

    def char(self, ahead: int = 0) -> Read[str]:
        """The character `ahead` of here; empty behind the end."""
        while self._place + ahead >= len(self._text):
            if self.ended:
                return ""
            yield
        return self._text[self._place + ahead]

    def starts_with(self, literal: str, ahead: int = 0) -> Read[bool]:
        """Whether `literal` stands there; known as soon as one character differs."""
        while True:
            start = self._place + ahead
            there = self._text[start : start + len(literal)]
            if there == literal:
                return True
            if self.ended or not literal.startswith(there):
                return False
            yield

    def starts_with_any(self, literals: tuple[str, ...], ahead: int = 0) -> Read[bool]:
        """Whether one of `literals` stands there; the empty one means the end of the text."""
        for literal in literals:
            if literal:
                if (yield from self.starts_with(literal, ahead)):
                    return True
            elif not (yield from self.char(ahead)):
                return True
        return False

    def ends_within(self, literal: str, ahead: int = 0) -> Read[int | None]:
        """How much of `literal` stands there if the text ends before the rest of it; else None."""
        length = 0
        while length < len(literal) and (character := (yield from self.char(ahead + length))):
            if character != literal[length]:
                return None
            length += 1
        return length if length < len(literal) else None

    def whitespace(self, ahead: int = 0) -> Read[int]:
        """How many characters of whitespace stand there."""
        count = 0
        while (character := (yield from self.char(ahead + count))) and character in WHITESPACE:
            count += 1
        return count

    def skip_whitespace(self) -> Read[None]:
        count = yield from self.whitespace()  # which may move the place
        self._place += count

    def take(self, count: int) -> str:
        """The next `count` characters, which must have been looked at."""
        taken = self._text[self._place : self._place + count]
        self._place += count
        return taken

    def take_run(self, pattern: re.Pattern[str]) -> str:
        """What `pattern` matches of the text that has arrived: only for runs that may be cut anywhere."""
        match = pattern.match(self._text, self._place)
        return self.take(match.end() - self._place) if match else ""


def finished(reader: Read[T]) -> T:
    """What a reader of an ended source returns."""
    try:
        while True:
            next(reader)
    except StopIteration as end:
        value: T = end.value
        return value

"""Stop strings found in streamed text, also across the borders of tokens and pushes."""

from collections.abc import Sequence


class StopStrings:
    """Passes text through until one of `stops` is complete; holds back what may yet become one.

    The stop string that is completed first wins (of several that end at the same character, the longest),
    so what is emitted does not depend on how the text was cut into pushes. Nothing from the stop string on
    is emitted.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.hit: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Returns the text that is safe to send now, and the stop string that ended the stream, if any."""
        if not self._stops or self.hit is not None:
            return ("" if self.hit is not None else text), self.hit
        pending = self._held + text
        found = [
            (start + len(stop), start, stop) for stop in self._stops if (start := pending.find(stop)) >= 0
        ]
        if found:
            _, start, self.hit = min(found)
            self._held = ""
            return pending[:start], self.hit
        keep = max(_overlap(pending, stop) for stop in self._stops)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep], None

    def flush(self) -> str:
        """Returns the text still held back, for a stream that ended without a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` and is not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)

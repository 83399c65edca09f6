"""Downloads a model of models.txt into the hub's cache: resumed where it stopped, and verified.

huggingface_hub's own `hf_hub_download` throws half a file away (since 1.0), so the bytes are
fetched with its `http_get`, beside the place where it looks for them. Once they are verified it
finds them there and does the rest.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import platformdirs

from laserkv_gguf import models
from laserkv_gguf.errors import LaserKVError, UserError
from laserkv_gguf.models import Entry
from laserkv_gguf.models.header import Header, Incomplete
from laserkv_gguf.shown import first_line

_FIRST, _MOST_OF_HEADER = 4 << 20, 1 << 30  # bytes asked for at first, and at most
_PARTIAL = 206  # HTTP's status
_SHA256 = re.compile(r"[0-9a-f]{64}")


def pull(entry: Entry, *, offline: bool = False) -> tuple[Path, bool]:
    """Makes sure that a model is on this machine and is what models.txt lists.

    Args:
        entry: of models.txt.
        offline: look into the caches only.

    Returns:
        The file, and whether it was downloaded now.

    Raises:
        UserError: gated, missing, no room, or not here and `offline`.
        LaserKVError: no network, or not the file that is listed; nothing unverified stays under
            a model's name.
    """
    place = models.present(entry)
    if place:
        _check(entry, place, "delete it and pull again")
        return place, False
    if entry.package:
        models.find(entry.name)  # says how to install it
    if offline or is_offline():
        raise UserError(f"{entry.name} is in no cache of this machine; pull it without --offline")
    return _download(entry), True


def header(entry: Entry) -> Path:
    """A file that holds a model's header and little more, fetched by range requests.

    It is kept in the cache of this project, so that the next plan needs no network.

    Raises:
        UserError: gated or missing, or a file that is no GGUF.
        LaserKVError: no network, or a hub that sends no parts of files.
    """
    place = _headers() / f"{(entry.sha256 or entry.source.replace('/', '--'))[:64]}-{entry.file}"
    if place.is_file():
        try:
            Header(place)
        except UserError:
            place.unlink()
        else:
            return place
    hub = _hub()
    metadata = _metadata(hub, entry, os.environ.get("HF_ENDPOINT") or None)
    size, have = metadata.size or _MOST_OF_HEADER, b""
    beside = place.with_suffix(f".{os.getpid()}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        while True:
            end = min(max(_FIRST, 2 * len(have)), size, _MOST_OF_HEADER)
            have += _part(hub, entry, metadata, len(have), end)
            beside.write_bytes(have)
            try:
                Header(beside)
            except Incomplete:
                if end < min(size, _MOST_OF_HEADER):
                    continue
                raise UserError(
                    f"the header of {entry.file} on the hub is damaged; see {page(entry)}"
                ) from None
            except UserError as error:
                raise UserError(str(error).replace(beside.name, entry.file)) from None
            beside.replace(place)
            return place
    except OSError as error:
        raise _cannot_write(error, place.parent) from error
    finally:
        beside.unlink(missing_ok=True)


def _headers() -> Path:
    return Path(platformdirs.user_cache_dir("laserkv-gguf")) / "headers"


def _part(hub: Any, entry: Entry, metadata: Any, start: int, end: int) -> bytes:
    """Bytes start … end - 1 of a file."""
    headers = {**_credentials(hub, entry, metadata), "range": f"bytes={start}-{end - 1}"}
    try:
        with _stream(hub, metadata.location, headers) as answer:
            answer.raise_for_status()
            if answer.status_code != _PARTIAL:
                raise LaserKVError(
                    f"{urlparse(metadata.location).netloc} sends no parts of files; "
                    f"pull {entry.name}, and plan then"
                )
            data: bytes = answer.read() if hasattr(answer, "read") else answer.content
            return data
    except LaserKVError:
        raise
    except Exception as error:  # which classes there are has changed between releases
        raise LaserKVError(
            f"the header of {entry.file} did not come ({first_line(error)}); check the network"
        ) from error


def _stream(hub: Any, url: str, headers: dict[str, str]) -> AbstractContextManager[Any]:
    """An answer whose body has not been read; httpx's since huggingface_hub 1.0, else requests'."""
    stream: Any = getattr(hub.utils, "http_stream_backoff", None)
    if stream is not None:
        answer: AbstractContextManager[Any] = stream("GET", url, headers=headers)
        return answer
    return closing(hub.utils.http_backoff("GET", url, headers=headers, stream=True))


def is_offline() -> bool:
    """Whether the hub is not to be asked (HF_HUB_OFFLINE)."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def page(entry: Entry) -> str:
    """The web page of the model's repository."""
    return f"https://huggingface.co/{entry.source}"


def _download(entry: Entry) -> Path:
    hub = _hub()
    endpoint = os.environ.get("HF_ENDPOINT") or None
    metadata = _metadata(hub, entry, endpoint)
    size, etag = metadata.size, metadata.etag
    announced = etag if etag and _SHA256.fullmatch(etag) else None
    if entry.sha256 and announced and announced != entry.sha256:
        raise LaserKVError(
            f"{entry.file} on the hub is no longer the file models.txt lists (sha256 {announced}); "
            f"see {page(entry)}"
        )
    if entry.size and size and size != entry.size:
        raise LaserKVError(
            f"{entry.file} on the hub has {size} bytes, models.txt lists {entry.size}; "
            f"see {page(entry)}"
        )
    blobs = models.hub_cache() / models.folder(entry) / "blobs"
    part = blobs / f"{entry.file}.part"
    try:
        blobs.mkdir(parents=True, exist_ok=True)
        with hub.utils.WeakFileLock(part.with_suffix(".lock")):
            _fetch(hub, entry, metadata, part)
            expected = entry.sha256 or announced
            found = digest(part) if expected else None
            if found != expected:
                part.unlink()
                raise LaserKVError(
                    f"what came for {entry.file} has the sha256 {found}, not {expected}; "
                    f"it was removed: pull again, or see {page(entry)}"
                )
            part.replace(blobs / etag)
        part.with_suffix(".lock").unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(error, blobs) from error
    return _linked(hub, entry, endpoint)


def _linked(hub: Any, entry: Entry, endpoint: str | None) -> Path:
    """Lets the hub's library file what has come under the repository's revision."""
    try:
        place = hub.hf_hub_download(
            entry.source, entry.file, cache_dir=models.hub_cache(), endpoint=endpoint
        )
    except Exception as error:
        raise _broken(entry, error) from error
    return Path(place)


def _hub() -> Any:
    """huggingface_hub; its progress bar only where somebody watches."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise UserError(
            "pull needs huggingface_hub; install it with pip install huggingface_hub"
        ) from None
    hub: Any = huggingface_hub
    if not sys.stderr.isatty():
        hub.utils.disable_progress_bars()
    return hub


def _metadata(hub: Any, entry: Entry, endpoint: str | None) -> Any:
    """Size, hash and place of the file."""
    url = hub.hf_hub_url(entry.source, entry.file, endpoint=endpoint)
    try:
        metadata = hub.get_hf_file_metadata(url)
    except Exception as error:  # which classes there are has changed between releases
        raise _refused(hub.errors, entry, error, url) from error
    if not metadata.etag or not metadata.commit_hash:
        raise LaserKVError(
            f"{urlparse(url).netloc} does not answer as the hub does; see HF_ENDPOINT"
        )
    return metadata


def _refused(errors: Any, entry: Entry, error: Exception, url: str) -> LaserKVError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    missing = (errors.RepositoryNotFoundError, errors.EntryNotFoundError)
    gated = isinstance(error, errors.GatedRepoError)
    if isinstance(error, missing) and not gated:
        return UserError(f"the hub shows no {entry.file} of {entry.source}; see {page(entry)}")
    if gated or status in (401, 403):
        return UserError(
            f"{entry.source} is not open to you; accept its licence on {page(entry)}, "
            "then log in with hf auth login and pull again"
        )
    if status is not None:
        return LaserKVError(f"the hub answers {status} for {entry.file}; try again later")
    return LaserKVError(
        f"cannot reach {urlparse(url).netloc} ({first_line(error)}); check the network and pull "
        "again"
    )


def _fetch(hub: Any, entry: Entry, metadata: Any, part: Path) -> None:
    """Appends what is missing to `part`."""
    from huggingface_hub.file_download import http_get

    have, size = part.stat().st_size if part.exists() else 0, metadata.size
    if size is not None and have > size:
        part.unlink()
        have = 0
    missing, free = (size or 0) - have, shutil.disk_usage(part.parent).free
    if missing > free:
        raise UserError(
            f"{entry.file} needs {missing / 2**30:.1f} GiB more and {part.parent} has "
            f"{free / 2**30:.1f} free; make room, or set HF_HOME to another disk"
        )
    if size is not None and have == size:
        return
    headers = _credentials(hub, entry, metadata)
    try:
        with part.open("ab", buffering=0) as file:  # what came is there, however we end
            http_get(
                metadata.location,
                file,
                resume_size=have,
                headers=headers,
                expected_size=size,
                displayed_filename=entry.file,
            )
    except OSError as error:
        if error.errno:  # of the disk, not of the network
            raise
        raise _broken(entry, error) from error
    except Exception as error:
        raise _broken(entry, error) from error


def _credentials(hub: Any, entry: Entry, metadata: Any) -> dict[str, str]:
    """The hub's headers for a request to where the file lies."""
    headers: dict[str, str] = hub.utils.build_hf_headers()
    url = hub.hf_hub_url(entry.source, entry.file, endpoint=os.environ.get("HF_ENDPOINT") or None)
    if urlparse(metadata.location).netloc != urlparse(url).netloc:
        # the token is for the hub, not for the store it sends us to
        headers.pop("authorization", None)
    return headers


def _broken(entry: Entry, error: Exception) -> LaserKVError:
    return LaserKVError(
        f"the download of {entry.file} broke off ({first_line(error)}); "
        f"pull {entry.name} again and it goes on where it was"
    )


def _cannot_write(error: OSError, folder: Path) -> LaserKVError:
    return LaserKVError(f"cannot write to {folder}: {error.strerror or error}; see HF_HOME")


def _check(entry: Entry, place: Path, remedy: str) -> None:
    """Refuses a file that is not what models.txt lists.

    Raises:
        LaserKVError: another size or hash, or no GGUF.
    """
    size = place.stat().st_size
    if entry.size is not None and size != entry.size:
        raise LaserKVError(f"{place} has {size} bytes, not {entry.size}; {remedy}")
    if entry.sha256 is not None and digest(place) != entry.sha256:
        raise LaserKVError(f"{place} has not the sha256 that models.txt lists; {remedy}")
    with place.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise LaserKVError(f"{place} is not a GGUF file; {remedy}")


def digest(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()

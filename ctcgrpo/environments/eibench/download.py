"""Downloading a file from an untrusted server: bounded in size and time, complete or refused, with few redirects."""

import http.client
import time
import urllib.error
import urllib.request
from io import BufferedIOBase
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from ctcgrpo.errors import ScenarioError
from ctcgrpo.util.naming import cut

_TIMEOUT = 60.0  # seconds that a server may be silent
_PART = 1 << 16


def download(url: str, target: Path, *, largest: int, patience: float, hosts: tuple[str, ...] = (), accept: str = "*/*") -> None:
    """Write the content of `url` to `target`: at most `largest` bytes, in `patience` seconds. Redirects are followed to where `url`
    is, and over https to `hosts`. Raises ScenarioError for what cannot be had, comes incomplete, is too large or too slow."""
    request = urllib.request.Request(url, headers={"Accept": accept})
    try:
        with urllib.request.build_opener(_Redirects(url, hosts)).open(request, timeout=_TIMEOUT) as response:
            length: int | None = response.length
            if length is None and not response.chunked:
                why = "so a cut file would look like a whole one"
                raise ScenarioError(f"{url} comes without a length (Content-Length), {why}")
            _check_size(url, length or 0, largest)
            with target.open("wb") as out:
                size = _pour(response, out, url, largest, patience, length)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ScenarioError(f"{url} cannot be downloaded ({_reason(error)})") from None
    if length is not None and size != length:
        raise ScenarioError(f"{url}: incomplete download, {size} of {length} bytes; try again")


def copy(source: Path, target: Path, *, largest: int, patience: float) -> None:
    """Copy a local file within the same bounds. Raises ScenarioError where it cannot be read, is too large or too slow."""
    try:
        with source.open("rb") as found, target.open("wb") as out:
            _pour(found, out, str(source), largest, patience)
    except OSError as error:
        raise ScenarioError(f"{source} cannot be copied: {error.strerror}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, http.client.IncompleteRead):
        return "the connection closed too early"
    message = cut(str(error))
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        if error.headers.get("X-RateLimit-Remaining") == "0":
            message += "; the server allows no more requests from this address for now, of GitHub's API 60 an hour"
    return message


def _pour(found: BufferedIOBase, out: BinaryIO, place: str, largest: int, patience: float, length: int | None = None) -> int:
    """Copy a file of acceptable size, in acceptable time, up to `length`; gives how much there was."""
    size, deadline = 0, time.monotonic() + patience
    while size != length and (part := found.read1(_PART if length is None else min(_PART, length - size))):
        size += len(part)
        _check_size(place, size, largest)
        if time.monotonic() > deadline:
            raise ScenarioError(f"{place}: not complete after {patience:g} s; try again on a faster connection")
        out.write(part)
    return size


def _check_size(place: str, size: int, largest: int) -> None:
    if size > largest:
        raise ScenarioError(f"{place} has {size} bytes or more; expected at most {largest} bytes")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to where the source is, and over https to `hosts`."""

    def __init__(self, source: str, hosts: tuple[str, ...]) -> None:
        self._source, self._hosts = urlsplit(source), hosts

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        there, here = urlsplit(newurl), self._source
        allowed = (here.netloc, *self._hosts)
        same = (there.scheme, there.netloc) == (here.scheme, here.netloc)
        if not same and not (there.scheme == "https" and there.netloc in allowed):
            expected = " or, over https, ".join(allowed)
            raise ScenarioError(f"{req.full_url} redirects to {newurl[:200]!r}; expected {expected}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)

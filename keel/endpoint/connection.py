"""Where an endpoint is, the key that it takes, and the HTTP client that goes there and nowhere else."""

from __future__ import annotations

import email.utils
import functools
import logging
import math
import os
import ssl
import time
import urllib.parse
from collections.abc import Mapping

import httpx2

from keel.types import UserError


def address_of(url: str, place: str) -> tuple[str, str]:
    """(address, the same without its query, which may hold a secret) of an API's base."""
    try:
        parts = urllib.parse.urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname)
        known = known and parts.port != 0  # raises ValueError for what is no port
        if known and "@" in parts.netloc:
            raise UserError(f"{place}: leave user:password@ out; the key belongs in the variable that key_env names")
        path = parts.path.rstrip("/")
        if not path.endswith("/chat/completions"):
            path += "/chat/completions"
        address = urllib.parse.urlunsplit(parts._replace(path=path, fragment=""))
        httpx2.URL(address)
    except (ValueError, httpx2.InvalidURL):
        known = False
    if not known:
        raise UserError(f"{place}: an endpoint's address starts with http:// or https:// and a host")
    return address, urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def key_in(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and (not key or key.isprintable())):
        raise UserError(
            f"the environment variable {variable} holds more than a key (a line break, or a character that is not "
            "ASCII); set it to the key alone"
        )
    return key


class _WithoutQuery(logging.Filter):
    """httpx logs each request's address, whose query may hold a secret."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(str(a).partition("?")[0] if isinstance(a, httpx2.URL) else a for a in record.args)
        return True


_WITHOUT_QUERY = _WithoutQuery()


@functools.cache
def _trusted(cert_file: str | None, cert_dir: str | None) -> ssl.SSLContext:
    """The machine's certificates, or those that the environment names; to read them takes a while."""
    return httpx2.create_ssl_context()


def open_client(headers: Mapping[str, str], timeout: float) -> httpx2.Client:
    logging.getLogger("httpx2").addFilter(_WITHOUT_QUERY)  # once, however often
    try:
        return httpx2.Client(
            headers=headers,
            timeout=timeout,
            follow_redirects=False,
            verify=_trusted(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")),
            limits=httpx2.Limits(max_connections=None),
        )
    except OSError as error:
        raise UserError(f"SSL_CERT_FILE: the certificates cannot be read ({error.strerror or error})") from None
    except (ImportError, ValueError, httpx2.InvalidURL):  # whose text may hold the proxy's password
        raise UserError(
            "the environment's proxy (HTTPS_PROXY, HTTP_PROXY or ALL_PROXY) is none that can be used; set it to "
            "http://host:port, install httpx2[socks] for SOCKS, or name the endpoint's host in NO_PROXY"
        ) from None


def untrusted(error: BaseException | None) -> bool:
    """Whether a certificate is behind an error, which does not pass by waiting."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error is not None


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header (a number, or a date); None without one that can be read."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None

"""A client of the labelling app's API (docs/api.md)::

    with Client("https://label.example.org", os.environ["KEEL_TOKEN"]) as keel:
        keel.add_responses([{"prompt": "2+2?", "responses": ["4", "5"]}])
        for vote in keel.votes():
            ...

It goes through pages, and tries again what may do later: a write has one key however often it is sent, so it counts
once. Rows and answers are plain dictionaries, as the API has them.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlsplit

import httpx2

from keel.endpoint.connection import open_client, retry_after
from keel.types import UserError

PAGE = 100
AGAIN = frozenset({429, 502, 503, 504})
LONGEST_WAIT = 60.0
Row = Mapping[str, Any]


class ApiError(UserError):
    """The app said no. ``status``: of its answer; None where there was none."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class NoToken(ApiError):
    """401: the token is none, or has ended."""


class NotAllowed(ApiError):
    """403: the token's role may not do this."""


class Refused(ApiError):
    """400, 404, 409, 413, 422: the app's last word on this request; the message says why."""


class Unavailable(ApiError):
    """It did not answer, or was too busy, each time that it was asked."""


class Client:
    """``url``: where people reach the app; ``tries``: how often a request is sent at most. UserError for an address
    that would show the token to others: https, or http to this machine."""

    def __init__(self, url: str, token: str, *, timeout: float = 60.0, tries: int = 6) -> None:
        parts = urlsplit(url)
        local = parts.hostname in ("127.0.0.1", "::1", "localhost")
        if not parts.hostname or not (parts.scheme == "https" or (parts.scheme == "http" and local)):
            raise UserError(f"{url}: a token is sent over https:// alone, or over http:// to this machine")
        if not token.strip() or not token.isascii() or not token.isprintable():
            raise UserError("the token is empty or no token; make one under Manage, API")
        self._base, self._tries = url.rstrip("/") + "/api/v1", tries
        self._http = open_client({"Authorization": f"Bearer {token.strip()}"}, timeout)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------- prompts, responses

    def me(self) -> dict[str, Any]:
        found: dict[str, Any] = self._get("me")
        return found

    def prompts(self) -> Iterator[dict[str, Any]]:
        after = ""
        while page := self._get("prompts", after=after, limit=PAGE):
            yield from page
            after = page[-1]["id"]

    def responses(self, prompt: str | None = None) -> Iterator[dict[str, Any]]:
        after = 0
        while page := self._get("responses", after=after, limit=PAGE, prompt=prompt):
            yield from page
            after = page[-1]["id"]

    def add_prompts(self, rows: Sequence[Row]) -> dict[str, Any]:
        return self._write("prompts", {"rows": list(rows)})

    def add_responses(
        self, rows: Sequence[Row], pairs: int | None = None, overlap: int = 1, unlabelled: bool = False
    ) -> dict[str, Any]:
        """Pairs, lists or single responses, as in a file (docs/data.md); ``pairs`` of each prompt are queued."""
        sent = {"rows": list(rows), "pairs": pairs, "overlap": overlap, "unlabelled": unlabelled}
        return self._write("responses", sent)

    # ---------------------------------------------------------------------------------------------------- labelling

    def take(self, kind: str = "compare", holding: Sequence[str] = ()) -> dict[str, Any] | None:
        """The next assignment; None when nothing is left."""
        said = self._send("POST", "assignments", {"kind": kind, "holding": list(holding)})
        found: dict[str, Any] | None = said["assignment"]
        return found

    def hand_in(self, assignment: Row, **said: Any) -> None:
        """What was judged: ``choice="left"`` of a comparison, ``up=True`` of a thumb, ..."""
        self._write(f"assignments/{quote(assignment['id'])}", {"kind": assignment["kind"], **said})

    def skip(self, assignment: Row, reason: str = "") -> None:
        self._write(f"assignments/{quote(assignment['id'])}/skip", {"reason": reason})

    def flag(self, assignment: Row, text: str = "") -> None:
        self._write(f"assignments/{quote(assignment['id'])}/flag", {"text": text})

    def undo(self, assignment: Row) -> None:
        self._write(f"assignments/{quote(assignment['id'])}/undo", {"kind": assignment["kind"]})

    def hold(self, assignments: Sequence[Row]) -> dict[str, Any]:
        """They are still being worked on. Which are ``gone``, and which are ``done``."""
        found: dict[str, Any] = self._send("POST", "assignments/hold", {"assignments": [a["id"] for a in assignments]})
        return found

    # ------------------------------------------------------------------------------------------------------ reading

    def votes(self, cursor: int = 0, since: datetime | None = None) -> Iterator[dict[str, Any]]:
        """Work as it came, to the end of what is there; go on later from the last one's ``cursor``."""
        more = True
        while more:
            page = self._get("votes", cursor=cursor, since=_time(since), limit=PAGE)
            yield from page["votes"]
            cursor, more = page["cursor"], page["more"]

    def preferences(self, since: datetime | None = None) -> Iterator[dict[str, Any]]:
        """What training takes. ApiError when the stream breaks: begin again."""
        try:
            with self._http.stream("GET", f"{self._base}/preferences.jsonl", params=_given(since=_time(since))) as got:
                if got.status_code != 200:
                    got.read()
                    raise _error(got)
                for line in got.iter_lines():
                    yield json.loads(line)
        except (httpx2.HTTPError, ValueError) as error:
            raise Unavailable(f"the stream broke ({type(error).__name__}); read it again") from error

    def progress(self, kind: str = "compare") -> dict[str, Any]:
        found: dict[str, Any] = self._get("progress", kind=kind)
        return found

    def quality(self, who: str = "people") -> dict[str, Any]:
        found: dict[str, Any] = self._get("quality", who=who)
        return found

    def queues(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._get("queues")
        return found

    def guideline(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self._get("guideline")
        return found

    def guidelines(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._get("guidelines")
        return found

    # ------------------------------------------------------------------------------------------------------ requests

    def _get(self, path: str, **asked: Any) -> Any:
        return self._send("GET", path, asked=_given(**asked))

    def _write(self, path: str, body: Row) -> dict[str, Any]:
        """One key for all tries."""
        said: dict[str, Any] = self._send("POST", path, body, {"Idempotency-Key": secrets.token_urlsafe(24)})
        return said

    def _send(
        self,
        method: str,
        path: str,
        body: Row | None = None,
        headers: Mapping[str, str] | None = None,
        asked: Mapping[str, Any] | None = None,
    ) -> Any:
        last: ApiError = Unavailable("it was not asked")
        for number in range(self._tries):
            wait = min(0.5 * 2**number, 10.0)
            try:
                got = self._http.request(
                    method, f"{self._base}/{path}", json=body, headers=dict(headers or {}), params=dict(asked or {})
                )
            except httpx2.HTTPError as error:
                last = Unavailable(f"the labelling app does not answer ({type(error).__name__})")
            else:
                if got.status_code == 200:
                    return _json(got)
                last = _error(got)
                if got.status_code not in AGAIN:
                    raise last
                told = retry_after(got.headers.get("retry-after"))
                wait = wait if told is None else min(told, LONGEST_WAIT)
            if number + 1 < self._tries:
                time.sleep(wait)
        raise last


def verified(secret: str, headers: Mapping[str, str], body: bytes, tolerance: float = 300.0) -> dict[str, Any]:
    """What a webhook's delivery says. ``headers``: the request's; ``body``: its bytes as they came. UserError unless
    whoever has the secret signed them, within ``tolerance`` seconds of now. A delivery may come more than once, with
    the same ``delivery``."""
    given = {name.lower(): value for name, value in headers.items()}.get("keel-signature", "")
    parts = dict(part.partition("=")[::2] for part in given.split(","))
    when, signed = parts.get("t", ""), parts.get("v1", "")
    wanted = hmac.new(secret.encode(), when.encode() + b"." + body, hashlib.sha256).hexdigest()
    if not hmac.compare_digest(signed.encode(), wanted.encode()):
        raise UserError("the delivery's signature is not right; take nothing from it")
    if not when.isdecimal() or abs(time.time() - int(when)) > tolerance:
        raise UserError("the delivery was signed at another time; somebody may be sending an old one again")
    found: dict[str, Any] = json.loads(body)
    return found


def _given(**asked: Any) -> dict[str, Any]:
    return {name: value for name, value in asked.items() if value is not None}


def _time(since: datetime | None) -> str | None:
    if since is not None and since.tzinfo is None:
        raise UserError("since: give a time with its zone, as datetime.now(UTC) is")
    return None if since is None else since.isoformat()


def _json(got: httpx2.Response) -> Any:
    try:
        return got.json()
    except ValueError:
        raise Unavailable("what answers is not the labelling app (no JSON)", got.status_code) from None


def _error(got: httpx2.Response) -> ApiError:
    try:
        said = str(got.json()["error"])
    except (ValueError, KeyError, TypeError):
        said = f"status {got.status_code}, and no word of Keel's: is this the labelling app's address?"
    kinds: dict[int, type[ApiError]] = {401: NoToken, 403: NotAllowed}
    retried = got.status_code in AGAIN or got.status_code >= 500
    return kinds.get(got.status_code, Unavailable if retried else Refused)(said, got.status_code)

"""Refusals: a status, a code and a reason for the peer; details for the audit log alone.

What a peer is told before it has proved who it is says nothing about who exists here: an unknown device, a
wrong signature and a device that was never approved are one answer, made by the same steps.
"""

from __future__ import annotations

from collections.abc import Mapping

from flep_fl.contracts.errors import (
    AuditDiskFullError,
    ClockError,
    DatabaseError,
    DataError,
    DiskFullError,
    FlepError,
    GrantExpiredError,
    GrantRevokedError,
    ImageFormatError,
    NotReleasedError,
    RegistryFullError,
    ReleaseChangedError,
    SequenceConflictError,
    StoreBusyError,
    UnknownDatasetError,
    UnknownGrantError,
)
from flep_fl.contracts.owner_api import error_body

RETRY_SECONDS = 1
UNAUTHORISED = "the request is not signed by anybody who is allowed to make it"


class Refusal(Exception):  # noqa: N818 - an answer, not an error of ours
    """An answer other than yes.

    Parameters
    ----------
    status, code, reason
        HTTP status, a stable word, and one sentence for the peer's operator.
    detail
        What the audit log gets on top; never sent.
    retry_after
        Seconds after which trying again makes sense; None where it does not.
    close
        End the connection: the rest of the request is not worth reading.
    headers
        Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        code: str,
        reason: str,
        *,
        detail: str = "",
        retry_after: int | None = None,
        close: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{status} {code}: {reason}")
        self.status, self.code, self.reason, self.detail = status, code, reason, detail
        self.retry_after, self.close, self._headers = retry_after, close, dict(headers or {})

    def body(self) -> bytes:
        """Return the JSON body."""
        return error_body(self.code, self.reason)

    def headers(self) -> dict[str, str]:
        """Return the headers, without length."""
        found = {"content-type": "application/json", **self._headers}
        if self.retry_after is not None:
            found["retry-after"] = str(self.retry_after)
        if self.close:
            found["connection"] = "close"
        return found


def unauthorised(detail: str) -> Refusal:
    """Return the one answer to everybody who has not proved an identity."""
    return Refusal(401, "unauthorised", UNAUTHORISED, detail=detail)


_STORE_ERRORS: Mapping[type[FlepError], tuple[int, str, int | None]] = {
    StoreBusyError: (503, "the database is busy; try again", RETRY_SECONDS),
    DiskFullError: (507, "the database has no space left", 30),
    AuditDiskFullError: (507, "the audit log has no space left", 30),
    RegistryFullError: (507, "the registry of devices has no space left", 30),
    ClockError: (503, "the data owner's clock is being looked at; try again later", 60),
    SequenceConflictError: (409, "the sequence number was used before", None),
    UnknownDatasetError: (404, "there is no such data set", None),
    ImageFormatError: (422, "the image is not of a kind that is taken", None),
    UnknownGrantError: (404, "there is no such grant for this key", None),
    GrantRevokedError: (403, "the grant was taken back", None),
    GrantExpiredError: (403, "the grant has expired", None),
    NotReleasedError: (409, "nothing of this data set has been released yet", None),
    ReleaseChangedError: (410, "the release has changed; open the grant again", None),
}


def refusal_of(error: FlepError) -> Refusal:
    """Turn an error of the database into an answer: its class is told, its message is not."""
    for kind in type(error).__mro__:
        if kind in _STORE_ERRORS:
            status, reason, retry = _STORE_ERRORS[kind]
            return Refusal(status, error.code, reason, detail=str(error), retry_after=retry)
    if isinstance(error, DataError) and not isinstance(error, DatabaseError):
        return Refusal(422, error.code, "the capture cannot be stored as it is", detail=str(error))
    return Refusal(500, "error", "the data owner's gateway failed", detail=f"{type(error).__name__}: {error}")

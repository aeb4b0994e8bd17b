"""Signed requests: one fixed profile of HTTP Message Signatures (RFC 9421), Ed25519.

Covered: method, path, query, ``Content-Digest`` of the body (RFC 9530, SHA-256), and ``Flep-Audience``, the
Ed25519 public key of the owner for whom the request is meant, so that one owner cannot replay it to another.
``created`` and ``nonce`` are parameters of the signature; whoever verifies also remembers nonces for as long
as it accepts old times. Any library of RFC 9421 can make such requests; only this exact form is accepted:

    Content-Digest: sha-256=:BASE64:
    Flep-Audience: 64 hex digits
    Signature-Input: flep=("@method" "@path" "@query" "content-digest" "flep-audience")\
;created=1790000000;keyid="64 hex digits";nonce="32 hex digits";alg="ed25519"
    Signature: flep=:BASE64:

This module knows no cryptography but the hash: signing and verifying are the callers'.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flep_fl.contracts.errors import RequestSignatureError

MAX_AGE_SECONDS = 300
"""How far ``created`` may lie from the verifier's clock, either way."""

AUDIENCE_HEADER = "flep-audience"
DIGEST_HEADER = "content-digest"
INPUT_HEADER = "signature-input"
SIGNATURE_HEADER = "signature"
HEADERS = (DIGEST_HEADER, AUDIENCE_HEADER, INPUT_HEADER, SIGNATURE_HEADER)

_COMPONENTS = '("@method" "@path" "@query" "content-digest" "flep-audience")'
_INPUT = re.compile(
    r"flep="
    + re.escape(_COMPONENTS)
    + r';created=(?P<created>[1-9][0-9]{0,11});keyid="(?P<key>[0-9a-f]{64})";'
    r'nonce="(?P<nonce>[0-9a-f]{32})";alg="ed25519"',
    re.ASCII,
)
_SIGNATURE = re.compile(r"flep=:(?P<value>[A-Za-z0-9+/]{86}==):", re.ASCII)


@dataclass(frozen=True, slots=True)
class RequestSignature:
    """What the headers of a signed request say; nothing of it is true before the signature is verified.

    Attributes
    ----------
    key
        The signer's raw Ed25519 public key, 32 bytes.
    created
        Seconds since 1970.
    nonce
        32 hex digits.
    signature
        64 bytes.
    base
        The bytes that the signature must cover.
    """

    key: bytes
    created: int
    nonce: str
    signature: bytes
    base: bytes


def sign_request(
    method: str,
    target: str,
    body: bytes,
    *,
    audience: bytes,
    key: bytes,
    sign: Callable[[bytes], bytes],
    created: int,
    nonce: str | None = None,
) -> dict[str, str]:
    """Make the four headers of a signed request.

    Parameters
    ----------
    method, target
        ``GET``, and path with query as they stand in the request line (``/v1/grants?x=1``).
    body
        The whole body, empty for none.
    audience
        The owner's raw Ed25519 public key.
    key, sign
        The signer's raw Ed25519 public key, and a function that signs bytes with its private key.
    created
        The signer's clock, seconds since 1970.
    nonce
        32 hex digits; fresh by default.
    """
    nonce = secrets.token_hex(16) if nonce is None else nonce
    headers = {DIGEST_HEADER: content_digest(body), AUDIENCE_HEADER: audience.hex()}
    params = f'{_COMPONENTS};created={created};keyid="{key.hex()}";nonce="{nonce}";alg="ed25519"'
    signature = sign(_base(method, target, headers, params))
    headers[INPUT_HEADER] = f"flep={params}"
    headers[SIGNATURE_HEADER] = f"flep=:{b64encode(signature).decode('ascii')}:"
    return headers


def read_signature(
    method: str, target: str, headers: Mapping[str, str], body: bytes, *, audience: bytes
) -> RequestSignature:
    """Read a signed request; the caller then verifies ``signature`` over ``base``, age and nonce.

    Parameters
    ----------
    method, target
        As received: method, and path with query.
    headers
        Header values by lower-case name, each at most once.
    body
        The whole body.
    audience
        The verifier's own raw Ed25519 public key.

    Raises
    ------
    RequestSignatureError
        A header is missing or not of the one accepted form, the body does not have its digest, or the request
        was meant for somebody else.
    """
    values = {}
    for name in HEADERS:
        if name not in headers:
            raise RequestSignatureError("the request is not signed", expected=f"the header {name}")
        values[name] = headers[name]
    if not hmac.compare_digest(values[DIGEST_HEADER].encode(), content_digest(body).encode()):
        raise RequestSignatureError("the request's body does not have the digest that was signed")
    if not hmac.compare_digest(values[AUDIENCE_HEADER].encode(), audience.hex().encode()):
        raise RequestSignatureError("the request is meant for another data owner")
    found, signature = _INPUT.fullmatch(values[INPUT_HEADER]), _SIGNATURE.fullmatch(values[SIGNATURE_HEADER])
    if found is None or signature is None:
        raise RequestSignatureError("the request's signature headers are not of the accepted form")
    return RequestSignature(
        key=bytes.fromhex(found["key"]),
        created=int(found["created"]),
        nonce=found["nonce"],
        signature=b64decode(signature["value"]),
        base=_base(method, target, values, values[INPUT_HEADER].removeprefix("flep=")),
    )


def content_digest(body: bytes) -> str:
    """Return the value of ``Content-Digest`` (RFC 9530)."""
    return f"sha-256=:{b64encode(hashlib.sha256(body).digest()).decode('ascii')}:"


def _base(method: str, target: str, headers: Mapping[str, str], params: str) -> bytes:
    path, _, query = target.partition("?")
    lines = (
        f'"@method": {method}',
        f'"@path": {path}',
        f'"@query": ?{query}',
        f'"content-digest": {headers[DIGEST_HEADER]}',
        f'"flep-audience": {headers[AUDIENCE_HEADER]}',
        f'"@signature-params": {params}',
    )
    return "\n".join(lines).encode()

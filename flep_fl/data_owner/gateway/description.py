"""The OpenAPI descriptions: exported by ``action=openapi``, not served by the public listeners."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from flep_fl.contracts.owner_api import CURSOR_HEADER, INDEX_TYPE, RECORDS_TYPE, error_body
from flep_fl.contracts.request_signing import HEADERS
from flep_fl.data_owner.devices import CAPTURE_HEADER, SIGNATURE_HEADER

VERSION = "1"

_ERROR = {
    "type": "object",
    "required": ["code", "reason"],
    "properties": {"code": {"type": "string"}, "reason": {"type": "string"}},
    "additionalProperties": False,
}
_REASONS = {
    400: "the request is not well formed",
    401: "the request is not signed by anybody who may make it",
    403: "whoever signed may not do this",
    404: "there is no such thing for this key",
    405: "the method is not one of this path",
    408: "the body did not arrive in time",
    409: "the request contradicts what is on file",
    410: "the release has changed",
    411: "Content-Length is missing",
    413: "the body is too large, or none is due",
    414: "the path is too long",
    422: "the image or its label is not of a kind that is taken",
    429: "too many requests; see Retry-After",
    431: "the head is too long",
    503: "busy; see Retry-After",
    507: "no space left",
}
_HEX32 = {"type": "string", "pattern": "^[0-9a-f]{32}$"}


def new_api(title: str, summary: str) -> FastAPI:
    """Return a FastAPI application without pages of its own, whose errors look like all others here."""
    api = FastAPI(
        title=title,
        description=summary,
        version=VERSION,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )

    async def plain(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 400
        headers = dict(getattr(error, "headers", None) or {}) | {"content-type": "application/json"}
        return Response(error_body("request", _REASONS.get(status, "the request failed")), status, headers)

    api.add_exception_handler(HTTPException, plain)
    api.add_exception_handler(RequestValidationError, plain)
    return api


def describe(
    summary: str,
    *,
    success: dict[int, Any],
    errors: tuple[int, ...],
    parameters: list[dict[str, Any]] | None = None,
    body: dict[str, Any] | None = None,
    signed: bool = True,
) -> dict[str, Any]:
    """Return what ``add_api_route`` needs to describe a route that reads its request itself."""
    headers = [_header(name, True, {"type": "string"}) for name in HEADERS] if signed else []
    extra: dict[str, Any] = {"parameters": [*(parameters or []), *headers]}
    if body is not None:
        extra["requestBody"] = {"required": True, "content": body}
    responses = {status: _response(_REASONS[status], _ERROR) for status in errors}
    for status, (text, schema) in success.items():
        responses[status] = _response(text, schema)
    return {
        "summary": summary,
        "response_class": Response,
        "response_model": None,
        "status_code": next(iter(success)),
        "responses": responses,
        "openapi_extra": extra,
    }


def describe_ingest() -> dict[str, Any]:
    """Describe ``POST /v1/captures``."""
    stored = {
        "type": "object",
        "required": ["record", "sequence"],
        "properties": {"record": _HEX32, "sequence": {"type": "integer", "minimum": 1}},
    }
    binary = {"schema": {"type": "string", "format": "binary", "minLength": 1}}
    return describe(
        "Hand in one signed capture",
        success={201: ("stored", stored), 200: ("stored before: the same record", stored)},
        errors=(400, 401, 403, 404, 408, 409, 411, 413, 422, 429, 431, 503, 507),
        parameters=[
            _header(CAPTURE_HEADER, True, {"type": "string", "maxLength": 1366}),
            _header(SIGNATURE_HEADER, True, {"type": "string", "maxLength": 86}),
            _header("idempotency-key", False, {"type": "string", "minLength": 1, "maxLength": 128}),
        ],
        body={"image/png": binary, "application/octet-stream": binary},
        signed=False,
    )


def describe_release() -> dict[str, dict[str, Any]]:
    """Describe the analysts' routes by name."""
    grant = {"name": "grant_id", "in": "path", "required": True, "schema": _HEX32}
    release = {"name": "release_id", "in": "path", "required": True, "schema": _HEX32}
    paging = [
        {"name": "cursor", "in": "query", "schema": {"type": "integer", "minimum": 0, "maximum": 2**53 - 1}},
        {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1}},
    ]
    usual = (400, 401, 403, 404, 409, 410, 413, 429, 431, 503, 507)
    anything = {"type": "object"}
    return {
        "owner": describe(
            "Who answers",
            success={200: ("key and clock", anything)},
            errors=(413, 429, 431, 503),
            signed=False,
        ),
        "grants": describe(
            "The caller's grants", success={200: ("grants", anything)}, errors=(400, 401, 413, 429, 431, 503)
        ),
        "open": describe(
            "Manifest, grant and key bundle",
            success={200: ("opened", anything)},
            errors=usual,
            parameters=[grant],
        ),
        "index": describe(
            f"Entries of the index; {CURSOR_HEADER} names the next page",
            success={200: ("entries", INDEX_TYPE)},
            errors=usual,
            parameters=[grant, release, *paging],
        ),
        "records": describe(
            f"Released records; {CURSOR_HEADER} names the next page",
            success={200: ("records", RECORDS_TYPE)},
            errors=usual,
            parameters=[grant, release, *paging],
        ),
    }


def describe_admin() -> dict[str, dict[str, Any]]:
    """Describe the administrators' routes by name."""
    anything = {"type": "object"}
    signed_by = (400, 401, 413, 429, 431, 503)
    return {
        "status": describe("How the gateway does", success={200: ("status", anything)}, errors=signed_by),
        "devices": describe("All devices", success={200: ("devices", anything)}, errors=signed_by),
        "head": describe("A fresh signed head", success={200: ("head", anything)}, errors=signed_by),
        "approve": describe(
            "Hand in one signed approval or suspension",
            success={200: ("the device's standing", anything)},
            errors=(400, 408, 409, 411, 413, 429, 431, 503, 507),
            body={"application/json": {"schema": {"type": "object"}}},
            signed=False,
        ),
    }


def _header(name: str, required: bool, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": required, "schema": schema}


def _response(text: str, schema: Any) -> dict[str, Any]:
    if isinstance(schema, str):
        return {"description": text, "content": {schema: {"schema": {"type": "string", "format": "binary"}}}}
    return {"description": text, "content": {"application/json": {"schema": schema}}}

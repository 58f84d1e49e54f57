"""Bodies of requests: JSON and forms, as values and files by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request

from ldm.serving.errors import ApiError, bad_field
from ldm.support.strict_json import parse_json
from ldm.support.text import shown

MOST_FIELDS, FORM_FILES, LONGEST_FIELD = 100, 20, 2**18  # of a form; bytes
FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")


def content_type(request: Request) -> str:
    """Return the type of a request's body, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_json_body(request: Request) -> dict[str, Any]:
    """Return the mapping that a request's body holds as JSON.

    Raises:
        ApiError: If it is of another type, or not a mapping in JSON.
    """
    kind = content_type(request)
    if kind not in ("application/json", ""):
        raise ApiError(
            415, f"content-type: expected application/json, got {shown(kind)}", code="invalid_body"
        )
    content = await request.body()
    try:
        return parse_json(content.decode("utf-8-sig"), "the body")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8, at byte {error.start}", code="invalid_body") from None
    except ValueError as error:
        raise ApiError(400, str(error), code="invalid_body") from None


async def read_form(request: Request) -> tuple[dict[str, str], dict[str, list[bytes]]]:
    """Return the texts of a form by name, and the contents of its files; "image[]" is "image".

    Raises:
        ApiError: If the body is no form, is damaged, or gives a text twice.
    """
    kind = content_type(request)
    if kind not in FORMS:
        raise ApiError(415, f"content-type: expected {FORMS[0]}, got {shown(kind)}", code="invalid_body")
    texts: dict[str, str] = {}
    files: dict[str, list[bytes]] = {}
    limits = {"max_files": FORM_FILES, "max_fields": MOST_FIELDS, "max_part_size": LONGEST_FIELD}
    try:
        async with request.form(**limits) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    files.setdefault(name.removesuffix("[]"), []).append(await value.read())
                elif name in texts:
                    raise bad_field(name, "given twice")
                else:
                    texts[name] = value
    except ApiError:
        raise
    except Exception as error:  # what damaged forms lead to depends on the versions of the parsers
        reason = getattr(error, "message", None) or getattr(error, "detail", None) or str(error)
        raise ApiError(400, f"the form is damaged: {reason}", code="invalid_body") from None
    return texts, files


def one_file(files: Mapping[str, list[bytes]], texts: Mapping[str, str], name: str) -> bytes | None:
    """Return the content of a file of a form; None if it is not there.

    Raises:
        ApiError: If there are several, or a text of this name.
    """
    if name in texts or f"{name}[]" in texts:
        raise bad_field(name, "expected a file, got a text", "invalid_type")
    found = files.get(name, [])
    if len(found) > 1:
        raise bad_field(name, f"expected one image, got {len(found)}: the models edit one image at a time")
    return found[0] if found else None

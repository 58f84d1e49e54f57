"""The OpenAPI document, made of the table that checks the fields."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ldm.serving.fields import EVERY, GENERATIONS, REQUEST_FIELDS, RequestField
from ldm.serving.sdapi import SDAPI_FIELDS
from ldm.support.version import __version__

JSON_TYPES = {"text": "string", "whole": "integer", "number": "number", "switch": "boolean", "size": "string"}
ANSWERS = {
    "400": "a field is wrong",
    "401": "the key is missing",
    "403": "the host or the origin is not the server's",
    "404": "there is no such model",
    "413": "the body is too large",
    "415": "the body is of another type",
    "429": "the queue is full",
}


def openapi_document() -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of the server."""
    paths: dict[str, Any] = {}
    for endpoint in EVERY:
        fields = [each for each in REQUEST_FIELDS if endpoint in each.on]
        media = "application/json" if endpoint == GENERATIONS else "multipart/form-data"
        paths[f"/v1/images/{endpoint}"] = {"post": operation(endpoint, {media: mapping_schema(fields)})}
    paths["/v1/models"] = {"get": operation("list of the models")}
    paths["/v1/models/{model}"] = {"get": operation("one model", parameters=["model"])}
    paths["/health"] = {"get": operation("whether the server is well")}
    paths["/metrics"] = {"get": operation("counts for Prometheus")}
    for name in ("txt2img", "img2img"):
        schema = mapping_schema(list(SDAPI_FIELDS.values()))
        if name == "img2img":
            image = {"type": "string", "contentEncoding": "base64"}
            schema["properties"] |= {
                "init_images": {"type": "array", "items": image, "minItems": 1, "maxItems": 1},
                "mask": image,
            }
            schema["required"] = ["init_images"]
        paths[f"/sdapi/v1/{name}"] = {"post": operation(name, {"application/json": schema})}
    for name in ("progress", "samplers", "sd-models", "options"):
        paths[f"/sdapi/v1/{name}"] = {"get": operation(name)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "ldm", "version": __version__},
        "paths": paths,
        "components": {"schemas": {"Error": ERROR_SCHEMA}},
    }


ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def operation(
    summary: str, body: Mapping[str, Any] | None = None, parameters: list[str] | None = None
) -> dict[str, Any]:
    """Return one operation of the document.

    Args:
        summary: What it is.
        body: Schema of its body by media type. Default: None, no body.
        parameters: Names of the parameters in its path. Default: None.
    """
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    made: dict[str, Any] = {
        "summary": summary,
        "responses": {
            "200": {"description": "done"},
            **{status: {"description": about, "content": error} for status, about in ANSWERS.items()},
        },
    }
    if body is not None:
        content = {media: {"schema": schema} for media, schema in body.items()}
        made["requestBody"] = {"required": True, "content": content}
    if parameters:
        made["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in parameters
        ]
    return made


def mapping_schema(fields: list[RequestField]) -> dict[str, Any]:
    """Return the schema of a mapping with these fields."""
    return {
        "type": "object",
        "required": [field.name for field in fields if field.required],
        "properties": {field.name: field_schema(field) for field in fields},
    }


def field_schema(field: RequestField) -> dict[str, Any]:
    """Return the schema of a field."""
    schema: dict[str, Any] = {"description": field.about}
    if field.kind == "file":
        return {**schema, "type": "string", "format": "binary"}
    schema["type"] = JSON_TYPES[field.kind]
    if field.choices:
        schema["enum"] = list(field.choices)
    if field.kind == "size":
        schema["pattern"] = "^(auto|[1-9][0-9]{0,3}x[1-9][0-9]{0,3})$"
    if field.kind in ("whole", "number"):
        schema["minimum"] = field.least
        if field.most != math.inf:
            schema["maximum"] = field.most
    return schema

"""`/openapi.json`: what routes that read bodies by themselves take and answer."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from jaxspark.serving.fields import Wire

_ERROR = {
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
_FAILED = {"content": {"application/json": {"schema": _ERROR}}}
# Every route answers errors alike.
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request cannot be served.", **_FAILED},
    "5XX": {"description": "The server cannot serve it now.", **_FAILED},
}


def body(schema: type[Wire]) -> dict[str, Any]:
    """What a route says of its body."""
    reference = {"$ref": f"#/components/schemas/{schema.__name__}"}
    content = {"application/json": {"schema": reference}}
    return {"requestBody": {"content": content, "required": True}}


def describe(app: FastAPI, schemas: list[type[Wire]]) -> None:
    """Adds the schemas of bodies to what the application says of itself."""
    described: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        document = described()
        known = document.setdefault("components", {}).setdefault("schemas", {})
        for schema in schemas:
            template = "#/components/schemas/{model}"
            found = schema.model_json_schema(ref_template=template)
            known |= found.pop("$defs", {})
            known[schema.__name__] = found
        return document

    app.openapi = openapi  # type: ignore[method-assign]

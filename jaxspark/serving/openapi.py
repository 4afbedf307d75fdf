"""`/openapi.json`: what routes that read bodies by themselves take and answer."""

from collections.abc import Callable
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel

from jaxspark.serving.fields import Wire
from jaxspark.serving.responses import Sent

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
# Of a stream; its data is a chunk of the answer, an error, or [DONE].
_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string"}},
}
# Every route answers errors alike.
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request cannot be served.", **_FAILED},
    "5XX": {"description": "The server cannot serve it now.", **_FAILED},
}


def body(schema: type[Wire]) -> dict[str, Any]:
    """What a route says of its body."""
    content = {"application/json": {"schema": _reference(schema)}}
    return {"requestBody": {"content": content, "required": True}}


def answer(schema: type[Sent]) -> dict[int | str, dict[str, Any]]:
    """What a route says of its answer, whole or as a stream of events."""
    whole = {"schema": _reference(schema)}
    content = {"application/json": whole, "text/event-stream": {"schema": _EVENT}}
    return {200: {"description": "The answer.", "content": content}}


def _reference(schema: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{schema.__name__}"}


def describe(app: FastAPI, schemas: list[type[Wire] | type[Sent]]) -> None:
    """Adds schemas of bodies and answers to what the application says of itself."""
    described: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        document = described()
        known = document.setdefault("components", {}).setdefault("schemas", {})
        for schema in schemas:
            template = "#/components/schemas/{model}"
            mode: Literal["serialization", "validation"] = (
                "serialization" if issubclass(schema, Sent) else "validation"
            )
            found = schema.model_json_schema(ref_template=template, mode=mode)
            known |= found.pop("$defs", {})
            known[schema.__name__] = found
        return document

    app.openapi = openapi  # type: ignore[method-assign]

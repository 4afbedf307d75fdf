"""Random grammars whose outputs are short, and whether a text obeys one.

Schemas use what clients use: objects with required and optional members, arrays with
bounds, choices, references, numbers within bounds. Expressions are choices, classes and
repetitions, nested.
"""

import json
import re
from typing import Any

import numpy as np

from jaxspark.grammars import Grammar

_WORDS = ("a", "name", "größe", "x y", "id", "日本", 'quote"', "value")
_CLASSES = ("[a-z]", "[0-9]", "[^,x]", "17?", "[A-F0-9]", "é", "ab", r"\.", "/", " ")


def random_grammars(random: np.random.Generator, count: int) -> list[Grammar]:
    """Half of them schemas, half expressions."""
    return [
        Grammar(kind="regex", value=random_regex(random))
        if i % 2
        else Grammar(kind="json_schema", value=random_schema(random))
        for i in range(count)
    ]


def random_schema(random: np.random.Generator) -> dict[str, Any]:
    """A schema of an object or an array."""
    return _schema(random, int(random.integers(1, 4)), inner=("object", "array"))


def _schema(
    random: np.random.Generator, depth: int, inner: tuple[str, ...] = ()
) -> dict[str, Any]:
    leaves = ("integer", "string", "boolean", "null", "enum", "number", "pattern")
    kinds = inner or (leaves + ("object", "array", "anyOf") if depth else leaves)
    match str(random.choice(kinds)):
        case "integer":
            least = int(random.integers(-20, 20))
            return {"type": "integer", "minimum": least, "maximum": least + 100}
        case "number":
            return {"type": "number", "minimum": 0, "maximum": 10}
        case "string":
            return {"type": "string", "maxLength": int(random.integers(0, 8))}
        case "pattern":
            return {"type": "string", "pattern": "^[a-c]{1,3}(-[0-9]{2})?$"}
        case "boolean":
            return {"type": "boolean"}
        case "null":
            return {"type": "null"}
        case "enum":
            return {"enum": [str(random.choice(_WORDS)), 7, None, {"k": [1]}]}
        case "anyOf":
            return {"anyOf": [_schema(random, depth - 1) for _ in range(2)]}
        case "array":
            least = int(random.integers(0, 3))
            return {
                "type": "array",
                "items": _schema(random, depth - 1),
                "minItems": least,
                "maxItems": least + int(random.integers(0, 3)),
            }
    names = random.choice(_WORDS, int(random.integers(1, 4)), replace=False).tolist()
    return {
        "type": "object",
        "properties": {name: _schema(random, depth - 1) for name in names},
        "required": [name for name in names if random.random() < 0.6],
        "additionalProperties": False,
    }


def random_regex(random: np.random.Generator, depth: int = 3) -> str:
    """An expression that means the same in Python and in Rust."""
    if depth == 0 or random.random() < 0.2:
        return str(random.choice(_CLASSES))
    parts = [random_regex(random, depth - 1) for _ in range(int(random.integers(1, 4)))]
    match int(random.integers(3)):
        case 0:
            return f"({'|'.join(parts)})"
        case 1:
            least = int(random.integers(0, 3))
            return f"({''.join(parts)}){{{least},{least + int(random.integers(0, 4))}}}"
    return "".join(parts)


def obeys(grammar: Grammar, text: str) -> bool:
    """Whether a whole output is what a random grammar wants; not by llguidance."""
    if grammar.kind == "regex":
        return re.fullmatch(grammar.value, text, re.DOTALL) is not None
    try:
        value = json.loads(text, object_pairs_hook=_members)
    except ValueError:
        return False
    return _fits(grammar.value, value)


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name that comes twice")
    return dict(pairs)


def _fits(schema: dict[str, Any], value: Any) -> bool:
    if "enum" in schema:
        return value in schema["enum"] and not isinstance(value, bool)
    if "anyOf" in schema:
        return any(_fits(each, value) for each in schema["anyOf"])
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match schema["type"]:
        case "null":
            return value is None
        case "boolean":
            return isinstance(value, bool)
        case "string":
            if not isinstance(value, str):
                return False
            found = re.search(schema.get("pattern", ""), value)
            return found is not None and len(value) <= schema.get("maxLength", 99)
        case "integer" | "number":
            if not number or (schema["type"] == "integer" and value != int(value)):
                return False
            return schema["minimum"] <= value <= schema["maximum"]
        case "array":
            return (
                isinstance(value, list)
                and schema["minItems"] <= len(value) <= schema["maxItems"]
                and all(_fits(schema["items"], each) for each in value)
            )
    known = schema["properties"]
    return (
        isinstance(value, dict)
        and set(schema["required"]) <= value.keys() <= known.keys()
        and all(_fits(known[name], each) for name, each in value.items())
    )

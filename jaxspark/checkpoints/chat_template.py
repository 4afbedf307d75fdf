"""Chat templates: messages to prompt text with sandboxed Jinja.

A template comes from the checkpoint, so it is untrusted: the sandbox gives it the
messages and a few harmless functions, no attributes of Python objects, no mutation, no
files. The environment is that of transformers' `apply_chat_template`, for which
templates are written.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxspark.checkpoints.errors import CheckpointError

Message = Mapping[str, Any]


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks training targets; here its content is plain text."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
) -> str:
    """The prompt text of a conversation.

    Args:
      template: Jinja source.
      messages: objects with at least `role` and `content`, oldest first.
      add_generation_prompt: whether to open the assistant's turn at the end.
      variables: what else the template may use: special tokens, `enable_thinking`, ...

    Raises:
      CheckpointError: the template is broken, forbidden by the sandbox, or refuses the
        messages.
    """
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise CheckpointError(
                f"chat message {index} is {message!r}, expected an object with 'role' "
                "and 'content'"
            )
    try:
        return _compiled(template).render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            **{"tools": None, "documents": None, **variables},
        )
    except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
        raise CheckpointError(
            f"the chat template fails on these {len(messages)} messages: {error}"
        ) from error
    except (ArithmeticError, AttributeError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"the chat template is broken: {error!r}") from error


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """JSON without Jinja's HTML escapes, which models were not trained on."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)

"""A language model ready to decode: the model, its tokenizer, and what ends a text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxspark.models import TargetModel
from jaxspark.text import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Target:
    """A language model ready to decode.

    Attributes:
      model: the decoder.
      tokenizer: None if there is none.
      stop_ids: ids that end a text.
      name: for messages and summaries.
      generation_config: what its makers recommend for sampling, under transformers'
        names. Nothing here follows it unasked; it is written where the model is.
    """

    model: TargetModel
    tokenizer: Tokenizer | None = None
    stop_ids: tuple[int, ...] = ()
    name: str = ""
    generation_config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, target: "Target | TargetModel") -> "Target":
        """The target itself, or a bare model as one without tokenizer and stops."""
        return target if isinstance(target, Target) else cls(model=target)

"""jaxspark: lossless speculative decoding for JAX.

DSpark (arXiv 2607.05147) as pure functions: draft a block, verify a prefix of it with
the target, emit exactly what the target alone would have emitted.

    from jaxspark import generate, load_drafter, load_target

    target = load_target("smollm2-135m-instruct")
    drafter = load_drafter("ngram", target)
    question = {"role": "user", "content": "Why is the sky blue?"}
    prompt = target.tokenizer.chat([question])
    [completion] = generate(target, [prompt], drafter)

Below it, `jaxspark.decoding` has the life-cycle of slots (`admit`, `prefill`, `decode`,
`release`) and `decode_round`, pure functions for use inside a caller's own `jit`.

Axis letters, as suffixes of local arrays (`q_TNH`) and in einsum strings:

    B slots             T flat tokens       Q rows of a slot in one pass
    S cached positions  C compressed entries  W window, or draft vocabulary
    D model width       N query heads       K key/value heads     H head width
    M query rows of one key/value head, or residual streams (V4)
    F MLP width         E experts           X experts per token, or stop ids
    V vocabulary        G draft block       L layers              R low rank
    P pages             m taps
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxspark.checkpoints import load_drafter, load_target
    from jaxspark.generation import (
        Completion,
        Request,
        SamplingParams,
        generate,
        generate_stream,
    )

__all__ = [
    "Completion",
    "Request",
    "SamplingParams",
    "generate",
    "generate_stream",
    "load_drafter",
    "load_target",
]
__version__ = "0.1.0"

_HOMES = {
    "Completion": "jaxspark.generation",
    "Request": "jaxspark.generation",
    "SamplingParams": "jaxspark.generation",
    "generate": "jaxspark.generation",
    "generate_stream": "jaxspark.generation",
    "load_drafter": "jaxspark.checkpoints",
    "load_target": "jaxspark.checkpoints",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for: a command line that lists launchers needs no JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

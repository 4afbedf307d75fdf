"""transformers, imported late and without its advice.

`import jaxspark` must stay quick, and only tokenizer classes are used: that there is no
PyTorch, or that a checkpoint names another tokenizer class, is nothing a user can act
on.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def quiet_transformers() -> Iterator[ModuleType]:
    """The module `transformers`, whose warnings are held back inside the block."""
    logger = logging.getLogger("transformers")
    disabled, logger.disabled = logger.disabled, True
    try:
        import transformers  # It sets its logger's level anew.

        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield transformers
        finally:
            logger.setLevel(level)
    finally:
        logger.disabled = disabled

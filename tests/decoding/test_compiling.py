"""The hosts of the loop compile it with options of the platform."""

import jax
import pytest

from jaxspark import generate
from jaxspark.decoding import compiling
from jaxspark.drafters import NgramDrafter
from tests import zoo


def test_options_of_the_platform_reach_the_compiler(monkeypatch):
    monkeypatch.setitem(compiling.COMPILER_OPTIONS, "cpu", {"no_such_option": "1"})
    compiling._compiled.cache_clear()
    ngram = NgramDrafter(block_length=2)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        generate(zoo.target(), zoo.prompts(3), ngram, max_new_tokens=2)
    compiling._compiled.cache_clear()

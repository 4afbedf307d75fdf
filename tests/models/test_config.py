"""Configurations that cannot work are refused by name, before any work."""

import numpy as np
import pytest

from jaxspark.models import DenseConfig, RopeConfig
from tests.models.test_cache_contract import TINY


def test_unknown_rope_type_is_named():
    with pytest.raises(ValueError, match=r"'spiral'.*default.*linear.*llama3.*yarn"):
        RopeConfig(rope_type="spiral")


@pytest.mark.parametrize("kind", ("llama3", "yarn"))
def test_rope_that_needs_the_original_context_says_so(kind):
    with pytest.raises(ValueError, match=f"{kind}.*original_max_position_embeddings"):
        RopeConfig(rope_type=kind, factor=4.0)


def test_uneven_groups_of_heads_are_refused():
    with pytest.raises(ValueError, match="4 query heads.*3 key/value heads"):
        DenseConfig(**TINY | {"num_key_value_heads": 3})


def test_odd_head_width_is_refused():
    with pytest.raises(ValueError, match="even.*7"):
        DenseConfig(**TINY | {"head_dim": 7})


@pytest.mark.parametrize("kind", ("linear", "llama3", "yarn"))
def test_a_factor_of_one_scales_nothing(kind):
    plain, _ = RopeConfig().frequencies(16)
    rope = RopeConfig(rope_type=kind, factor=1.0, original_max_position_embeddings=64)
    scaled, scale = rope.frequencies(16)
    np.testing.assert_allclose(scaled, plain, rtol=1e-6)
    assert scale == 1.0


@pytest.mark.parametrize("kind", ("linear", "llama3", "yarn"))
def test_scaling_slows_low_frequencies_by_the_factor(kind):
    rope = RopeConfig(rope_type=kind, factor=4.0, original_max_position_embeddings=64)
    ratio = RopeConfig().frequencies(16)[0] / rope.frequencies(16)[0]
    assert ratio[-1] == pytest.approx(4.0, rel=1e-5)
    assert (np.diff(ratio) >= -1e-6).all() and ratio[0] >= 1 - 1e-6

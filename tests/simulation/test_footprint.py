"""What models weigh: the published counts, to the last parameter and byte."""

import pytest

from jaxspark.configs.targets import (
    deepseek_v4_flash,
    deepseek_v4_pro,
    smollm2_135m,
    tiny_llama,
)
from jaxspark.simulation.footprint import V32_BYTES_PER_TOKEN, footprint

PUBLISHED = {
    deepseek_v4_flash: (284_332_240_471, 13.27e9, 3514),
    deepseek_v4_pro: (1_572_997_201_763, 48.85e9, 5031),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_deepseek_v4_weighs_what_is_published(preset):
    total, active, cache = PUBLISHED[preset]
    weighed = footprint(preset(), (4096, 1048576))
    assert weighed.total == total
    assert weighed.active == pytest.approx(active, rel=1e-3)
    assert int(sum(weighed.cache["released"].values())) == cache
    assert weighed.flops[1048576] > weighed.flops[4096] > 2 * weighed.active


def test_flash_keeps_a_tenth_of_what_v32_did():
    weighed = footprint(deepseek_v4_flash())
    mine = sum(weighed.cache["released"].values()) + weighed.state["released"] / 2**20
    assert mine / V32_BYTES_PER_TOKEN <= 0.1


def test_dense_models_are_counted_too():
    weighed = footprint(smollm2_135m(), (1000,))
    assert weighed.total == 134_515_008
    # Three heads of 64, keys and values, 30 layers, two bytes.
    assert weighed.cache["bfloat16"]["keys and values"] == 2 * 2 * 3 * 64 * 30
    assert weighed.flops[1000] == 2 * weighed.active + 4 * 9 * 64 * 30 * 1000
    assert footprint(tiny_llama()).parameters["LM head"] == 97 * 32

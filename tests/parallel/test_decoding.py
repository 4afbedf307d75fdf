"""Guarantees on meshes: whatever the mesh, the tokens are those of one device.

Every drafter on every mesh is in `jaxspark audit --suite=mesh`.
"""

import jax
import pytest

from jaxspark.exactness.audit_schedules import ScheduleAudit, ScheduleCell
from jaxspark.parallel.mesh import make_mesh


@pytest.mark.parametrize(
    ("family", "drafter"),
    [("dense", "dspark-rnn"), ("deepseek_v4", "deepseek_v4_dspark")],
)
def test_tokens_are_those_of_one_device(family, drafter):
    """Slots, experts, heads and vocabulary are all shared out."""
    audit = ScheduleAudit(
        family=family,
        slots=16,
        shards=8,
        drafters=[drafter],
        mixes=["stream"],
        couplings=["gumbel"],
    )
    cell = ScheduleCell(
        drafter=drafter, schedule="lagged", coupling="gumbel", buckets="one"
    )
    with jax.set_mesh(make_mesh("data:2,expert:2,model:2")):
        result = audit.run(cell, mixes=("stream",))
    assert result.audit.tokens > 300
    assert not result.audit.violations
    assert len(result.audit.near_ties) <= 1
    assert 0 < result.drafted < result.rounds

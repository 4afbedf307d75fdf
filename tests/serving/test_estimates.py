"""What an engine learns about acceptance can be looked at while it serves."""

import json
import math
from dataclasses import asdict

from jaxspark.decoding import DecodeOptions, Estimator, Threshold
from jaxspark.generation import Request
from jaxspark.serving import Demand, Engine, Pace
from jaxspark.serving import engine as engine_module
from jaxspark.serving.metrics import Metrics
from jaxspark.target import Target
from tests import zoo


def values(metrics, name):
    lines = metrics.text().decode().split("\n")
    return [float(line.split()[-1]) for line in lines if line.startswith(name + "{")]


def test_what_was_learned_is_in_stats_and_metrics(monkeypatch):
    monkeypatch.setattr(engine_module, "_LOOK_S", 0.0)
    model, metrics = zoo.target(), Metrics("m")
    options = DecodeOptions(
        block_length=3,
        coupling="gumbel",
        schedule=Threshold(0.05),
        estimator=Estimator(every=1),
    )
    with Engine(
        Target(model=model),
        zoo.drafter("dflash", model),
        slots=2,
        context=64,
        chunk=16,
        options=options,
        top_log_probs=0,
        prompt_log_probs=False,
        pace=Pace(few=1, most=4),
        observers=[metrics],
    ) as engine:
        metrics.watch(engine)
        # Compiling has taught it nothing, and that can be said in JSON.
        begun = json.loads(json.dumps(asdict(engine.stats()), allow_nan=False))
        assert begun["estimate"] is None
        assert all(map(math.isnan, values(metrics, "jaxspark:calibration_error")))
        for temperature in (0.0, 1.0):
            request = Request([1, 2, 3], max_new_tokens=20, temperature=temperature)
            assert list(engine.submit(Demand(request=request, group="a", choice=0)))
        assert engine.wait_idle(30)
        stats = engine.stats()
        assert stats.late_compilations == 0
        assert stats.estimate.blocks > 10
        [error] = values(metrics, "jaxspark:calibration_error")
        assert 0 <= error == stats.estimate.calibration_error
        sampled = stats.estimate.regressions["sampled"]
        assert sampled.certainty in values(metrics, "jaxspark:acceptance_slope")
        intercepts = values(metrics, "jaxspark:acceptance_intercept")
        assert len(intercepts) == 6 and set(sampled.intercepts) <= set(intercepts)
        # All gauges are of one moment.
        looks, look = [], engine.stats
        monkeypatch.setattr(engine, "stats", lambda: looks.append(1) or look())
        metrics.text()
        assert len(looks) == 1

"""Training drafters: data, objective, optimization, checkpoints of a run."""

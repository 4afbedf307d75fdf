"""Training drafters: data, objective, optimisation, checkpoints of a run."""

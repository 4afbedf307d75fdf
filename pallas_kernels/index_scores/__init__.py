"""See `api.index_scores`; `ref` states the maths."""

"""See `api.draft_sampling`; `ref` states the maths."""

"""See `api.compress`; `ref` states the maths."""

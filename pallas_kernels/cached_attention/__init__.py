"""See `api.cached_attention`; `ref` states the maths."""

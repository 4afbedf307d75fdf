"""See `api.sparse_attention`; `ref` states the maths."""

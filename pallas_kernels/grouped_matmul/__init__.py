"""See `api.grouped_matmul`; `ref` states the maths."""

"""See `api.hyper_connections`; `ref` states the maths."""

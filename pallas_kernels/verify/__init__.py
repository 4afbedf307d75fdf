"""See `api.verify`; `ref` states the maths."""

"""See `api.hyper_mix`; `ref` states the maths."""

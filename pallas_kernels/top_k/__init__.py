"""See `api.top_k`; `ref` states the choice, `bisection` makes it without a sort."""

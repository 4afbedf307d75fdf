"""See `api.top_k`; `ref` states the choice, others make it without a sort."""

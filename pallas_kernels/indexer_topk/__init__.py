"""See `api.indexer_topk`; `ref` states it, `selection` says how a kernel chooses."""

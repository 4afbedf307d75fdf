"""How we know: exactness audits, exact enumeration, statistics and timing."""

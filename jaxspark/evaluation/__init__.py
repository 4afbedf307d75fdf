"""How we know: exactness audits and, later, accepted length and plots."""

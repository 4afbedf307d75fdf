"""Number formats that weights are stored in."""

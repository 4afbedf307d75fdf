"""Suites of `jaxspark audit`: grids that are run, reported and gone on with."""

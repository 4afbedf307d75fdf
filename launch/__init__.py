"""`python -m launch.NAME` from a clone: the launchers of `jaxspark.launch`."""

from jaxspark import launch

__path__ = launch.__path__

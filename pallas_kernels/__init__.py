"""Kernels behind one door: each op is a function with an `implementation` argument.

"xla" always exists and is the specification. Ops live in `<op>/{api,ref}.py`.
"""

from pallas_kernels.cached_attention.api import cached_attention

__all__ = ["cached_attention"]

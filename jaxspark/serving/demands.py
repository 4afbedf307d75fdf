"""What the engine is asked for: requests with everything a client can want.

`SamplingParams` has how an output is continued. What is beside it concerns its place
among others.
"""

from dataclasses import dataclass

from jaxspark.generation import Request


@dataclass(frozen=True, kw_only=True)
class Demand:
    """One output that the engine is asked for.

    Attributes:
      group: the id of the client's request; outputs of a group share prompts.
      choice: its number among them.
      request: the prompt's tokens and how they are continued.
      priority: lower ones go first.
      deadline_s: seconds from its arrival after which it is given up; None waits.
      cache_salt: prefixes are shared only among requests with the same; None is one
        too.
    """

    group: str
    choice: int
    request: Request
    priority: int = 0
    deadline_s: float | None = None
    cache_salt: str | None = None

"""What jaxtyping's import hook checks annotations with."""

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function):
    """By beartype, an int being a float.

    Constructors are left: loops and maps build pytrees of stacked or abstract leaves.
    So are methods that name `Self`, of which it would want the class.
    """
    if function.__name__ == "__init__":
        return function
    try:
        return _beartype(function)
    except BeartypeDecorHintPep673Exception:
        return function

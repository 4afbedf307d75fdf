"""The one error that loading and saving raise."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; says what was seen and expected."""

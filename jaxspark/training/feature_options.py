"""Options of target features and their cache."""

from dataclasses import dataclass
from pathlib import Path

from jaxspark.configuration import Configuration, option
from jaxspark.models import TargetDecoder
from jaxspark.training.data.packing import Packed
from jaxspark.training.feature_cache import FeatureCache
from jaxspark.training.features import FeatureSource


@dataclass(frozen=True, kw_only=True)
class FeatureOptions(Configuration):
    """Whether features are cached, and where."""

    features: str = option(
        "Run the target every time, or once.", "cached", choices=("online", "cached")
    )
    cache_dir: str | None = option("Folder of cached features; <out>/features.", None)
    cache_gb: float = option("Gigabytes that the cache may take.", 8.0, at_least=0)
    cache_layers: tuple[int, ...] | None = option(
        "Layers to cache, if more than the taps.", None
    )

    def cached_layers(self, taps: tuple[int, ...], depth: int) -> tuple[int, ...]:
        """The layers of a target whose outputs are cached; none without a cache.

        Raises:
          ValueError: the target has no such layer, or a tap is not among them.
        """
        if self.features != "cached":
            return ()
        chosen = self.cache_layers or taps
        missing = sorted(set(taps) - set(chosen))
        if missing:
            raise ValueError(f"--cache_layers={chosen} lacks the taps {missing}")
        for layer in chosen:
            if not -1 <= layer < depth:
                raise ValueError(
                    f"--cache_layers={chosen}: the target has layers 0..{depth - 1} "
                    "(-1: the embedding)"
                )
        return chosen

    def source(
        self,
        target: TargetDecoder,
        taps: tuple[int, ...],
        packed: Packed,
        layers: tuple[int, ...],
        folder: Path,
    ) -> FeatureSource:
        """Features of any batch of some sequences.

        Args:
          target: whose they are.
          taps: layers that the drafter sees.
          packed: all sequences.
          layers: of `cached_layers`.
          folder: for the cache, if the options name none.
        """
        cache = None
        if layers:
            cache = FeatureCache(
                self.cache_dir or folder,
                target,
                packed,
                layers=layers,
                limit_bytes=int(self.cache_gb * 1e9),
            )
        return FeatureSource(target, taps, cache)

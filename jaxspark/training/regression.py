"""Ridge regressions over batches, and maps of low rank by their effect on logits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxspark.parallel.mesh import replicated


class Regression:
    """y_RO ~ x_RI W_OI^T over batches of weighted rows, by its normal equations."""

    def __init__(self, xx: np.ndarray | float = 0.0, xy: np.ndarray | float = 0.0):
        self.xx, self.xy = np.asarray(xx), np.asarray(xy)

    def add(self, x_RI: Float[Array, "R I"], y_RO: Float[Array, "R O"], weight_R):
        """Adds a batch."""
        xx_II, xy_IO = _moments(x_RI, y_RO, weight_R)
        self.xx = self.xx + np.asarray(xx_II, np.float64)
        self.xy = self.xy + np.asarray(xy_IO, np.float64)

    def solve(self, penalty: float = 1e-3) -> Float[np.ndarray, "O I"]:
        """W, each input penalised in proportion to its mean square."""
        diagonal = np.diag(self.xx) + 1e-9 * np.trace(self.xx) / len(self.xx)
        return np.linalg.solve(self.xx + np.diag(penalty * diagonal), self.xy).T


@jax.jit
def _moments(x_RI, y_RO, weight_R):
    dot = partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
    weighted_IR = (x_RI * weight_R[:, None]).T
    return replicated((dot(weighted_IR, x_RI), dot(weighted_IR, y_RO)))


def logit_metric(scaled_WD: Float[np.ndarray, "W D"]) -> Float[np.ndarray, "D D"]:
    """M with |M^T y| the spread of the logits that a normed hidden state y gives."""
    mean_D = scaled_WD.mean(0, dtype=np.float64)
    gram_DD = (scaled_WD.T @ scaled_WD).astype(np.float64) / len(scaled_WD)
    return cholesky(gram_DD - np.outer(mean_D, mean_D), 1e-3)


def cholesky(moments_II: np.ndarray, ridge: float) -> np.ndarray:
    """Lower factor, with a part of the mean diagonal added to the diagonal.

    Raises:
      ValueError: there is none: what was summed up were too few rows.
    """
    size = len(moments_II)
    ridge_II = ridge * np.trace(moments_II) / size * np.eye(size)
    try:
        return np.linalg.cholesky(moments_II + ridge_II)
    except np.linalg.LinAlgError as error:
        raise ValueError(
            f"the data have too few positions to fit {size} inputs by least squares; "
            "give more, or start another way (--init=target or random)"
        ) from error


def leading_directions(
    regression: Regression, width: int, metric_DD: np.ndarray, *, emphasis: float
) -> Float[np.ndarray, "D X"]:
    """The D directions of the first inputs that matter most for the logits.

    They are uncorrelated, of a size that falls with their importance.

    Args:
      regression: of hidden states of several rows, [G D], on X and other inputs.
      width: X.
      metric_DD: what a hidden state does to the logits.
      emphasis: exponent of the importance in the size; 0 makes all of size one.
    """
    D = len(metric_DD)
    inner_XX = regression.xx[:width, :width]
    size_X = np.sqrt(np.diag(inner_XX))
    lower_XX = cholesky(inner_XX / np.outer(size_X, size_X), 1e-4)
    predict_GDX = regression.solve()[:, :width].reshape(-1, D, width) * size_X
    effect = np.einsum("gdx,de->gex", predict_GDX, metric_DD)
    effect = effect.reshape(-1, width) @ lower_XX
    values, vectors = np.linalg.eigh(effect.T @ effect)
    order = np.argsort(values)[::-1][:D]
    weight_D = (np.maximum(values[order], 0) / values[order[0]]) ** (emphasis / 2)
    directions_DX = np.linalg.solve(lower_XX.T, vectors[:, order]).T
    return weight_D[:, None] * directions_DX / size_X


def low_rank(
    regression: Regression, metric_DD: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """left @ right^T of a rank, nearest to the map in its effect on logits."""
    lower_DD = cholesky(regression.xx, 1e-6)
    effect = metric_DD.T @ regression.solve(1e-2) @ lower_DD
    u, s, vt = np.linalg.svd(effect, full_matrices=False)
    half_R = np.sqrt(s[:rank])
    left_DR = np.linalg.solve(metric_DD.T, u[:, :rank] * half_R)
    right_DR = np.linalg.solve(lower_DD.T, vt[:rank].T * half_R)
    return left_DR, right_DR

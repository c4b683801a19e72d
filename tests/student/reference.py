"""The regressors rewritten from the papers in float64 NumPy, without code of dtcache or torch."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
BN_EPS = 1e-5


def conv(x: Array, weight: Array, bias: Array | None = None, stride: int = 1) -> Array:
    """Return the cross-correlation of (B, C, H, W) with (O, C, k, k), zero-padded by k // 2."""
    k = weight.shape[2]
    padded = np.pad(x, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (k, k), (2, 3))[
        :, :, ::stride, ::stride
    ]
    out = np.einsum("bchwij,ocij->bohw", windows, weight)
    return out if bias is None else out + bias[:, None, None]


def resized(x: Array, size: tuple[int, int]) -> Array:
    """Return bilinear interpolation between pixel centres, edges repeated."""
    for axis, wanted in ((2, size[0]), (3, size[1])):
        have = x.shape[axis]
        at = np.clip((np.arange(wanted) + 0.5) * have / wanted - 0.5, 0, have - 1)
        low = np.floor(at).astype(int)
        share = (at - low).reshape((-1, 1) if axis == 2 else (-1,))
        high = np.minimum(low + 1, have - 1)
        x = x.take(low, axis) * (1 - share) + x.take(high, axis) * share
    return x


def bins(x: Array, scale: int) -> Array:
    """Return means over scale x scale bins, from floor(i n / s) to ceil((i + 1) n / s)."""
    h, w = x.shape[2:]
    edges = [[(i * n // scale, -(-(i + 1) * n // scale)) for i in range(scale)] for n in (h, w)]
    return np.stack(
        [np.stack([x[:, :, a:b, c:d].mean((2, 3)) for c, d in edges[1]], -1) for a, b in edges[0]],
        -2,
    )


class Reference:
    """A regressor from a state dict of arrays, with batch normalisation in evaluation mode."""

    def __init__(self, state: dict[str, Array], kind: str) -> None:
        self._state = state
        self._kind = kind

    def bn(self, name: str, x: Array) -> Array:
        """Normalise by running statistics."""
        weight, bias, mean, var = (
            self._state[f"{name}.{part}"][:, None, None]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / np.sqrt(var + BN_EPS) * weight + bias

    def block(self, name: str, x: Array, stride: int = 1) -> Array:
        """Convolution, batch normalisation, ReLU."""
        return np.maximum(
            self.bn(f"{name}.1", conv(x, self._state[f"{name}.0.weight"], stride=stride)), 0
        )

    def ppm(self, x: Array) -> Array:
        """PSPNet's pyramid pooling."""
        pooled = [
            resized(self.block(f"pooling.branches.{i}", bins(x, scale)), x.shape[2:])
            for i, scale in enumerate((1, 2, 3, 6))
        ]
        return self.block("pooling.merge", np.concatenate([x, *pooled], 1))

    def attend(self, x: Array) -> Array:
        """Add the attention-weighted values of all positions, one query at a time."""
        q, k, v = (
            conv(x, self._state[f"attention.{n}.weight"], self._state[f"attention.{n}.bias"])
            for n in ("query", "key", "value")
        )
        mixed = np.zeros_like(v)
        for b, i, j in np.ndindex(len(x), *x.shape[2:]):
            scores = np.einsum("c,chw->hw", q[b, :, i, j], k[b]) / np.sqrt(len(q[b]))
            weights = np.exp(scores - scores.max())
            mixed[b, :, i, j] = (v[b] * weights / weights.sum()).sum((1, 2))
        return x + self.bn("attention.out.1", conv(mixed, self._state["attention.out.0.weight"]))

    def __call__(self, maps: list[Array], levels: dict[str, int]) -> dict[str, Array]:
        """Return predictions by target, each on the grid of its level."""
        last = len(maps) - 1
        top = (
            self.ppm(maps[-1])
            if self._kind == "fpn-ppm"
            else self.block(f"laterals.{last}", maps[-1])
        )
        found = [self.attend(top) if self._kind == "fpn-attention" else top]
        for i in range(last - 1, -1, -1):
            found.insert(
                0, self.block(f"laterals.{i}", maps[i]) + resized(found[0], maps[i].shape[2:])
            )
        if self._kind == "pafpn":
            found = [
                self.block(f"smooth.{i}", x)
                for i, x in enumerate(found[: max(levels.values()) + 1])
            ]
            for i in range(1, len(found)):
                down = resized(
                    self.block(f"bottom_up.down.{i - 1}", found[i - 1], stride=2),
                    found[i].shape[2:],
                )
                found[i] = self.block(f"bottom_up.fuse.{i - 1}", found[i] + down)
        else:
            found = [
                self.block(f"smooth.{i}", x) if i in levels.values() else x
                for i, x in enumerate(found)
            ]
        return {
            name: conv(
                found[level], self._state[f"heads.{i}.weight"], self._state[f"heads.{i}.bias"]
            )
            for i, (name, level) in enumerate(levels.items())
        }

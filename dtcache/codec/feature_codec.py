"""All taps' codecs together: raw features to payloads in stage 1, payloads to targets in stage 2."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dtcache.codec.float16 import HalfDecoder, HalfEncoder, HalfTap, pack_half, unpack_half
from dtcache.codec.pca_dct import Decoder, Encoder
from dtcache.codec.rans import RansTables, decode_batch, encode, rans_tables
from dtcache.codec.tap_codec import FittedTap
from dtcache.payloads import Payloads
from dtcache.whitening import whiten

TapFit = FittedTap | HalfTap
"""The fit of one tap, of either codec."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedView:
    """One tap of one view as a payload, with what the quantiser did to it."""

    payload: bytes
    """Empty where the teacher's map was not finite."""
    squared_error: float
    """After whitening, summed over the map."""
    energy: float
    """Of the whitened map about the data set's channel means."""
    finite: bool
    """Whether the teacher's map was finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantisedMaps:
    """One tap of B views after the quantiser, before the entropy coder."""

    values_BN: Tensor
    """int16, or fp16 of a float16 tap."""
    measures_5B: Tensor
    """fp64: mu, sigma, squared error, energy, and whether the map was finite."""
    copied: torch.cuda.Event | None = None
    """Set where the tensors are still on their way to the host."""

    def to_host(self, stream: torch.cuda.Stream | None) -> "QuantisedMaps":
        """Return the maps on the host; with a CUDA stream the copy runs there, beside what the device computes."""
        if stream is None:
            return self
        stream.wait_stream(torch.cuda.current_stream(self.values_BN.device))
        with torch.cuda.stream(stream):
            host = [
                torch.empty_like(x, device="cpu", pin_memory=True)
                for x in (self.values_BN, self.measures_5B)
            ]
            for there, here in zip((self.values_BN, self.measures_5B), host, strict=True):
                here.copy_(there, non_blocking=True)
                there.record_stream(stream)
            copied = torch.cuda.Event(blocking=True)
            copied.record(stream)
        return QuantisedMaps(values_BN=host[0], measures_5B=host[1], copied=copied)


class FeatureEncoder:
    """Encodes raw features of named taps: quantised on the device that they lie on, entropy-coded on the host."""

    def __init__(self, fit: Mapping[str, TapFit], device: torch.device) -> None:
        self._encoders: dict[str, nn.Module] = {}
        self._packers: dict[str, Callable[[NDArray[Any], float, float], bytes]] = {}
        for name, fitted in fit.items():
            if isinstance(fitted, HalfTap):
                self._encoders[name], self._packers[name] = (
                    HalfEncoder(fitted).to(device),
                    pack_half,
                )
            else:
                self._encoders[name], self._packers[name] = (
                    Encoder(fitted).to(device),
                    _rans_packer(fitted),
                )

    @torch.inference_mode()
    def quantise(self, name: str, *raw_draws_BCHW: Tensor) -> QuantisedMaps:
        """Whiten, transform and quantise one tap's maps, each by itself.

        Of several draws it is their mean that is coded: of the whitened maps, and of the scalars that whitened them.
        """
        draws = [whiten(raw_BCHW) for raw_BCHW in raw_draws_BCHW]
        whitened_BCHW, mu_B, sigma_B = draws[0]
        if len(draws) > 1:
            whitened_BCHW, mu_B, sigma_B = (
                torch.stack(parts).mean(0) for parts in zip(*draws, strict=True)
            )
        # A value that is not finite makes both scalars so, and spoils no other view.
        finite_B = torch.isfinite(mu_B) & torch.isfinite(sigma_B)
        values_BN, error_B, energy_B = self._encoders[name](whitened_BCHW)
        measures_5B = torch.stack(
            [x.double() for x in (mu_B, sigma_B, error_B, energy_B, finite_B)]
        )
        return QuantisedMaps(values_BN=values_BN, measures_5B=measures_5B)

    def pack(self, name: str, maps: QuantisedMaps, places: Iterable[int]) -> list[EncodedView]:
        """Entropy-code some of the views; threads may pack different ones at once."""
        if maps.copied is not None:
            maps.copied.synchronize()
        values = maps.values_BN.numpy(force=True)
        measures = maps.measures_5B.numpy(force=True)
        packer = self._packers[name]
        views = []
        for i in places:
            mu, sigma, error, energy, finite = measures[:, i].tolist()
            payload = packer(values[i], mu, sigma) if finite else b""
            views.append(
                EncodedView(
                    payload=payload, squared_error=error, energy=energy, finite=bool(finite)
                )
            )
        return views

    def encode(self, name: str, *raw_draws_BCHW: Tensor) -> list[EncodedView]:
        """Quantise and pack one tap's maps."""
        maps = self.quantise(name, *raw_draws_BCHW)
        return self.pack(name, maps, range(len(maps.values_BN)))


def _rans_packer(fitted: FittedTap) -> Callable[[NDArray[Any], float, float], bytes]:
    tables = rans_tables(fitted)
    bound = fitted.payload_bound
    return lambda values_N, mu, sigma: encode(values_N, mu, sigma, tables, bound)


class HostDecoder:
    """Entropy decoding, the only codec work on the host: payloads to coefficients and scalars."""

    def __init__(self, fit: Mapping[str, TapFit]) -> None:
        self._tables: dict[str, RansTables | int] = {
            name: int(np.prod(fitted.shape)) if isinstance(fitted, HalfTap) else rans_tables(fitted)
            for name, fitted in fit.items()
        }

    def decode(self, name: str, payloads: Payloads) -> tuple[Tensor, Tensor]:
        """Return coefficients (B, n), int16 (fp16 of a float16 tap), and (sigma, mu) (B, 2) fp32. Raises CodecError."""
        tables = self._tables[name]
        unpacked = (
            unpack_half(payloads, tables)
            if isinstance(tables, int)
            else decode_batch(payloads, tables)
        )
        return torch.from_numpy(unpacked[0]), torch.from_numpy(unpacked[1])


class FeatureDecoder(nn.Module):
    """Coefficients to features on the student's device."""

    def __init__(self, fit: Mapping[str, TapFit]) -> None:
        super().__init__()
        self._names = list(fit)
        self._decoders = nn.ModuleList(
            HalfDecoder(fitted) if isinstance(fitted, HalfTap) else Decoder(fitted)
            for fitted in fit.values()
        )

    def forward(self, coefficients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whitened features, fp32 (B, C, H, W), by tap; raw = whitened * sigma + mu."""
        decoders = dict(zip(self._names, self._decoders, strict=True))
        return {name: decoders[name](values) for name, values in coefficients.items()}


def sha256_fit(fit: Mapping[str, TapFit]) -> str:
    """Return the SHA-256 over all arrays of all taps: names, dtypes, shapes and bytes (little-endian, C order)."""
    digest = hashlib.sha256()
    for tap, fitted in sorted(fit.items()):
        for name, array in fitted.arrays().items():
            digest.update(f"{tap}/{name}:{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()

"""All taps' codecs together: raw features to payloads in stage 1, payloads to targets in stage 2."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dtcache.codec.fitted import FittedTap
from dtcache.codec.half import HalfDecoder, HalfEncoder, HalfTap, pack_half, unpack_half
from dtcache.codec.rans import RansTables, decode_batch, encode, rans_tables
from dtcache.codec.transform import Decoder, Encoder, whiten
from dtcache.payloads import Payloads

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


class FeatureEncoder:
    """Encodes raw features of named taps on the device that they lie on."""

    def __init__(self, fit: Mapping[str, TapFit], device: torch.device) -> None:
        self._encoders: dict[str, nn.Module] = {}
        self._packers: dict[str, Callable[[NDArray[Any], float, float], bytes]] = {}
        for name, fitted in fit.items():
            if isinstance(fitted, HalfTap):
                self._encoders[name], self._packers[name] = HalfEncoder(fitted).to(device), pack_half
            else:
                self._encoders[name], self._packers[name] = Encoder(fitted).to(device), _rans_packer(fitted)

    @torch.inference_mode()
    def encode(self, name: str, *raw_draws_BCHW: Tensor) -> list[EncodedView]:
        """Whiten, transform, quantise and entropy-code one tap's maps, each by itself.

        Of several draws it is their mean that is coded: of the whitened maps, and of the scalars that whitened them.
        """
        draws = [whiten(raw_BCHW) for raw_BCHW in raw_draws_BCHW]
        whitened_BCHW, mu_B, sigma_B = (torch.stack(parts).mean(0) for parts in zip(*draws, strict=True))
        finite = torch.isfinite(whitened_BCHW).flatten(1).all(1)
        values_BN, error_B, energy_B = self._encoders[name](torch.nan_to_num(whitened_BCHW, 0.0, 0.0, 0.0))
        pack = self._packers[name]
        values, mu, sigma, errors, energies, good = (
            x.cpu().numpy() for x in (values_BN, mu_B, sigma_B, error_B, energy_B, finite)
        )
        return [
            EncodedView(
                payload=pack(values[i], mu[i], sigma[i]) if good[i] else b"",
                squared_error=float(errors[i]),
                energy=float(energies[i]),
                finite=bool(good[i]),
            )
            for i in range(len(values))
        ]


def _rans_packer(fitted: FittedTap) -> Callable[[NDArray[Any], float, float], bytes]:
    tables, bound = rans_tables(fitted), fitted.payload_bound
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
        unpacked = unpack_half(payloads, tables) if isinstance(tables, int) else decode_batch(payloads, tables)
        return torch.from_numpy(unpacked[0]), torch.from_numpy(unpacked[1])


class FeatureDecoder(nn.Module):
    """Coefficients to features on the student's device."""

    def __init__(self, fit: Mapping[str, TapFit]) -> None:
        super().__init__()
        self._names = list(fit)
        self._decoders = nn.ModuleList(
            HalfDecoder(fitted) if isinstance(fitted, HalfTap) else Decoder(fitted) for fitted in fit.values()
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

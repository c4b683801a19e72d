"""All taps' codecs together: raw features to payloads in stage 1, payloads to targets in stage 2."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dtcache.codec.fitted import FittedTap
from dtcache.codec.rans import RansTables, decode_batch, encode, rans_tables
from dtcache.codec.transform import Decoder, Encoder, whiten
from dtcache.payloads import Payloads


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedTap:
    """One tap of a batch as payloads, with what the quantiser did to it."""

    payloads: list[bytes]
    squared_error: NDArray[np.float64]
    """(B,): after whitening, summed over the map."""
    energy: NDArray[np.float64]
    """(B,): of the whitened map about the data set's channel means."""
    finite: NDArray[np.bool_]
    """(B,): whether the teacher's map was finite; a payload of one that was not is empty."""


class FeatureEncoder:
    """Encodes raw features of named taps on the device that they lie on."""

    def __init__(self, fit: Mapping[str, FittedTap], device: torch.device) -> None:
        self._encoders = {name: Encoder(fitted).to(device) for name, fitted in fit.items()}
        self._tables = {name: rans_tables(fitted) for name, fitted in fit.items()}
        self._bounds = {name: fitted.payload_bound for name, fitted in fit.items()}

    @torch.inference_mode()
    def encode(self, name: str, raw_BCHW: Tensor) -> EncodedTap:
        """Whiten, transform, quantise and entropy-code one tap's maps, each by itself."""
        whitened_BCHW, mu_B, sigma_B = whiten(raw_BCHW)
        finite = torch.isfinite(whitened_BCHW).flatten(1).all(1)
        values_BN, error_B, energy_B = self._encoders[name](torch.nan_to_num(whitened_BCHW, 0.0, 0.0, 0.0))
        values, mu, sigma = values_BN.cpu().numpy(), mu_B.cpu().numpy(), sigma_B.cpu().numpy()
        good = finite.cpu().numpy()
        payloads = [
            encode(values[i], mu[i], sigma[i], self._tables[name], self._bounds[name]) if good[i] else b""
            for i in range(len(values))
        ]
        return EncodedTap(
            payloads=payloads, squared_error=error_B.cpu().numpy(), energy=energy_B.cpu().numpy(), finite=good
        )


class HostDecoder:
    """Entropy decoding, the only codec work on the host: payloads to coefficients and scalars."""

    def __init__(self, fit: Mapping[str, FittedTap]) -> None:
        self._tables: dict[str, RansTables] = {name: rans_tables(fitted) for name, fitted in fit.items()}

    def decode(self, name: str, payloads: Payloads) -> tuple[Tensor, Tensor]:
        """Return coefficients (B, n) int16 and (sigma, mu) (B, 2) fp32. Raises CodecError."""
        values, scalars = decode_batch(payloads, self._tables[name])
        return torch.from_numpy(values), torch.from_numpy(scalars)


class FeatureDecoder(nn.Module):
    """Coefficients to features on the student's device."""

    def __init__(self, fit: Mapping[str, FittedTap]) -> None:
        super().__init__()
        self._names = list(fit)
        self._decoders = nn.ModuleList(Decoder(fitted) for fitted in fit.values())

    def forward(self, coefficients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whitened features, fp32 (B, C, H, W), by tap; raw = whitened * sigma + mu."""
        decoders = dict(zip(self._names, self._decoders, strict=True))
        return {name: decoders[name](values) for name, values in coefficients.items()}

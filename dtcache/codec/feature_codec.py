"""The codecs of all taps: raw features to payloads (stage 1), payloads to targets (stage 2)."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dtcache.codec.float16 import HalfTap
from dtcache.codec.pca_dct import FittedTap
from dtcache.codec.tap_codec import TapCodec
from dtcache.errors import CodecError
from dtcache.payloads import Payloads, Sections
from dtcache.recipe import array_of
from dtcache.whitening import whiten


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedView:
    """One tap of one view as a section of a payload, with the quantiser's error."""

    section: bytes
    """Empty if the teacher's map is not finite."""
    squared_error: float
    """Squared error of the whitened map, summed over its values."""
    energy: float
    """Squared distance of the whitened map from the data set's channel means, summed."""
    finite: bool
    """Whether the teacher's map is finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantisedMaps:
    """One tap of B views after the quantiser, before the section coder."""

    values_BN: Tensor
    """int16; fp16 for a float16 tap."""
    measures_5B: Tensor
    """fp64: mu, sigma, squared error, energy, and whether the map is finite."""
    copied: torch.cuda.Event | None = None
    """Set while the tensors are being copied to the host; recorded when the copy is complete."""

    def to_host(self, stream: torch.cuda.Stream | None) -> "QuantisedMaps":
        """Return the maps on the host.

        If `stream` is given, the copy runs on that CUDA stream while the device continues to
        compute.
        """
        if stream is None:
            return self
        stream.wait_stream(torch.cuda.current_stream(self.values_BN.device))
        with torch.cuda.stream(stream):
            host = [
                torch.empty_like(x, device="cpu", pin_memory=True)
                for x in (self.values_BN, self.measures_5B)
            ]
            for source, target in zip((self.values_BN, self.measures_5B), host, strict=True):
                target.copy_(source, non_blocking=True)
                source.record_stream(stream)
            copied = torch.cuda.Event(blocking=True)
            copied.record(stream)
        return QuantisedMaps(values_BN=host[0], measures_5B=host[1], copied=copied)


class FeatureEncoder:
    """Encodes raw features: quantises on their device, packs payloads on the host."""

    def __init__(self, fit: Mapping[str, TapCodec], device: torch.device) -> None:
        self._encoders = {name: fitted.encoder().to(device) for name, fitted in fit.items()}
        self._coders = {name: fitted.section_coder() for name, fitted in fit.items()}
        self._sections = sections_of(fit)

    @torch.inference_mode()
    def quantise(self, name: str, *raw_draws_BCHW: Tensor) -> QuantisedMaps:
        """Whiten, transform and quantise one tap's maps, each sample independently.

        If several draws are given, their mean is encoded: the mean of the whitened maps and of the
        whitening scalars.
        """
        draws = [whiten(raw_BCHW) for raw_BCHW in raw_draws_BCHW]
        whitened_BCHW, mu_B, sigma_B = draws[0]
        if len(draws) > 1:
            whitened_BCHW, mu_B, sigma_B = (
                torch.stack(parts).mean(0) for parts in zip(*draws, strict=True)
            )
        # A value that is not finite makes both scalars of its own view not finite, and only those.
        finite_B = torch.isfinite(mu_B) & torch.isfinite(sigma_B)
        values_BN, error_B, energy_B = self._encoders[name](whitened_BCHW)
        measures_5B = torch.stack(
            [x.double() for x in (mu_B, sigma_B, error_B, energy_B, finite_B)]
        )
        return QuantisedMaps(values_BN=values_BN, measures_5B=measures_5B)

    def pack(self, name: str, maps: QuantisedMaps, indices: Iterable[int]) -> list[EncodedView]:
        """Pack the views at `indices` of the batch.

        Thread-safe: several threads may pack different views at the same time.
        """
        if maps.copied is not None:
            maps.copied.synchronize()
        values = maps.values_BN.numpy(force=True)
        measures = maps.measures_5B.numpy(force=True)
        coder = self._coders[name]
        views = []
        for i in indices:
            mu, sigma, error, energy, finite = measures[:, i].tolist()
            section = coder.pack(values[i], mu, sigma) if finite else b""
            views.append(
                EncodedView(
                    section=section, squared_error=error, energy=energy, finite=bool(finite)
                )
            )
        return views

    def encode(self, name: str, *raw_draws_BCHW: Tensor) -> list[EncodedView]:
        """Quantise and pack one tap's maps."""
        maps = self.quantise(name, *raw_draws_BCHW)
        return self.pack(name, maps, range(len(maps.values_BN)))

    def payloads(self, views: Mapping[str, Sequence[EncodedView]]) -> dict[str, list[bytes]]:
        """Join the taps of B views, given by tap, to payloads by array.

        A payload is empty if a map of its view is not finite.
        """
        joined = {}
        for array, sections in self._sections.items():
            by_tap = zip(*(views[name] for name in sections.bounds), strict=True)
            joined[array] = [sections.join([view.section for view in taps]) for taps in by_tap]
        return joined


class HostDecoder:
    """Payloads to coefficients and scalars: the only codec work on the host in stage 2."""

    def __init__(self, fit: Mapping[str, TapCodec]) -> None:
        self._coders = {name: fitted.section_coder() for name, fitted in fit.items()}
        self._sections = sections_of(fit)

    def sections(self, array: str, payloads: Payloads) -> dict[str, Payloads]:
        """Return the sections of B payloads of an array by tap.

        Raises PayloadError, with the index in the batch, if a payload is damaged.
        """
        return self._sections[array].split(payloads)

    def decode(self, name: str, sections: Payloads) -> tuple[Tensor, Tensor]:
        """Return coefficients (B, n) and (sigma, mu) pairs (B, 2) of one tap.

        Coefficients are int16, or fp16 for a float16 tap; pairs are fp32. Raises PayloadError, with
        the index in the batch, if a section is damaged.
        """
        values, scalars = self._coders[name].unpack(sections)
        return torch.from_numpy(values), torch.from_numpy(scalars)


class FeatureDecoder(nn.Module):
    """Coefficients to features, on the student's device."""

    def __init__(self, fit: Mapping[str, TapCodec]) -> None:
        super().__init__()
        self._names = list(fit)
        self._decoders = nn.ModuleList(fitted.decoder() for fitted in fit.values())

    def forward(self, coefficients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whitened features, fp32 (B, C, H, W), by tap; raw = whitened * sigma + mu."""
        decoders = dict(zip(self._names, self._decoders, strict=True))
        return {name: decoders[name](values) for name, values in coefficients.items()}


def sections_of(fit: Mapping[str, TapCodec]) -> dict[str, Sections]:
    """Return how the taps of each array share its payloads; `fit` has the taps in their order."""
    bounds: dict[str, dict[str, int]] = {}
    for name, fitted in fit.items():
        bounds.setdefault(array_of(name), {})[name] = fitted.section_bound
    return {array: Sections(bounds=of_taps) for array, of_taps in bounds.items()}


def make_tap_codec(codec: str, arrays: Mapping[str, NDArray[Any]]) -> TapCodec:
    """Return the codec of one tap from its stored arrays.

    `codec` is the name in the recipe: pca-dct-rans or float16. Raises CodecError for another name
    or for arrays that contradict each other, and TypeError if an array is missing.
    """
    classes = {"pca-dct-rans": FittedTap, "float16": HalfTap}
    if codec not in classes:
        raise CodecError(f"codec {codec[:40]!r}: expected one of {', '.join(classes)}")
    fitted: TapCodec = classes[codec](**arrays)
    return fitted


def sha256_fit(fit: Mapping[str, TapCodec]) -> str:
    """Return the SHA-256 over all arrays of all taps.

    The hash covers names, dtypes, shapes and bytes (little-endian, C order).
    """
    digest = hashlib.sha256()
    for tap, fitted in sorted(fit.items()):
        for name, array in fitted.arrays().items():
            digest.update(f"{tap}/{name}:{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()

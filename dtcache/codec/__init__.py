"""The feature codec: whitening, PCA over channels, full-frame DCT, one global step, static-table rANS."""

from dtcache.codec.bands import DeterminedBands
from dtcache.codec.codec import (
    EncodedView,
    FeatureDecoder,
    FeatureEncoder,
    HostDecoder,
    QuantisedMaps,
    TapFit,
    sha256_fit,
)
from dtcache.codec.fitted import FittedTap, most_bytes
from dtcache.codec.half import HalfTap

__all__ = [
    "DeterminedBands",
    "EncodedView",
    "FeatureDecoder",
    "FeatureEncoder",
    "FittedTap",
    "HalfTap",
    "HostDecoder",
    "QuantisedMaps",
    "TapFit",
    "most_bytes",
    "sha256_fit",
]

"""The feature codec: whitening, PCA over channels, full-frame DCT, one global step, static-table rANS."""

from dtcache.codec.feature_codec import (
    EncodedView,
    FeatureDecoder,
    FeatureEncoder,
    HostDecoder,
    QuantisedMaps,
    TapFit,
    sha256_fit,
)
from dtcache.codec.float16 import HalfTap
from dtcache.codec.tap_codec import FittedTap, most_bytes
from dtcache.losses.band_weighting import DeterminedBands

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

"""Feature codecs: PCA, DCT, quantiser and static-table rANS; or plain float16."""

from dtcache.codec.feature_codec import (
    EncodedView,
    FeatureDecoder,
    FeatureEncoder,
    HostDecoder,
    QuantisedMaps,
    make_tap_codec,
    sections_of,
    sha256_fit,
)
from dtcache.codec.float16 import HalfTap
from dtcache.codec.pca_dct import FittedTap, max_array_bytes
from dtcache.codec.tap_codec import Bands, TapCodec

__all__ = [
    "Bands",
    "EncodedView",
    "FeatureDecoder",
    "FeatureEncoder",
    "FittedTap",
    "HalfTap",
    "HostDecoder",
    "QuantisedMaps",
    "TapCodec",
    "make_tap_codec",
    "max_array_bytes",
    "sections_of",
    "sha256_fit",
]

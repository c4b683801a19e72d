"""The feature codec: whitening, PCA over channels, full-frame DCT, one global step, static-table rANS."""

from dtcache.codec.codec import EncodedTap, FeatureDecoder, FeatureEncoder, HostDecoder
from dtcache.codec.fitted import FittedTap, sha256_fit

__all__ = ["EncodedTap", "FeatureDecoder", "FeatureEncoder", "FittedTap", "HostDecoder", "sha256_fit"]

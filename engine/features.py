"""
Encoded pictures that are kept: a picture that many prompts ask about is encoded once.

Known by what they are and how they were cut, never by a name that a caller gave.
"""

from torch import Tensor

from engine.cache import Cache


class FeatureCache(Cache[bytes, Tensor]):
    """Features of pictures, by what the pictures are."""

    def keep(self, key: bytes, features: Tensor) -> None:
        """Keep a copy: what is given is often a part of something larger."""
        num_bytes = features.numel() * features.element_size()
        if self.takes(key, num_bytes):
            self.put(key, features.clone(), num_bytes)

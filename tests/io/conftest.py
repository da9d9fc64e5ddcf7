"""What the tests of storage share."""

from helpers.children import children

__all__ = ["children"]

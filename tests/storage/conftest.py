"""What the tests of storage share."""

from children_small import children

__all__ = ["children"]

"""What the tests of streams share."""

from helpers.children import children

__all__ = ["children"]

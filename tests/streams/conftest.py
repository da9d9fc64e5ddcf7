"""What the tests of streams share."""

from children_small import children

__all__ = ["children"]

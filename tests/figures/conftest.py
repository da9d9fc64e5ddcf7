"""Fixtures: the paper's runs on a small model."""

from helpers.paper import small, stored  # noqa: F401

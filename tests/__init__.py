"""Tests, one directory a package."""

"""Tests of the bundled assets."""

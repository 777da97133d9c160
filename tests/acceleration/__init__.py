"""Tests of medqlora.acceleration."""

"""Tests of medqlora.quantization."""

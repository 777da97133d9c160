"""Tests of medqlora.finetuning."""

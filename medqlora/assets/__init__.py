"""The bundled sample questions and the tiny base model, with the code that made them."""

from medqlora.assets.build_sample import (
    FACTS_DIR,
    SAMPLE_DIR,
    Fact,
    build_rows,
    check_split_law,
    read_facts,
    read_rows,
    write_rows,
)

__all__ = [
    "FACTS_DIR",
    "SAMPLE_DIR",
    "Fact",
    "build_rows",
    "check_split_law",
    "read_facts",
    "read_rows",
    "write_rows",
]

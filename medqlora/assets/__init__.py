"""The bundled sample questions and the tiny base model, with the code that made them."""

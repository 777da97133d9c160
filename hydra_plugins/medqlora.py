"""Where Hydra looks for plugins: the namespace package `hydra_plugins`, without `__init__.py`."""

from medqlora.search import Search


class OptunaSweeper(Search):
    """`hydra/sweeper=optuna`; see `medqlora.search`."""

"""Everything that trains: typed configs, data, the one loop, the tasks, the evaluation and the command line."""

from .shipped import config_files

__all__ = ["config_files"]

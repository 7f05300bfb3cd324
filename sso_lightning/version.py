"""The version, alone in a file so that `--version` needs no heavy import."""

__version__ = "0.1.0"

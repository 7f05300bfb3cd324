"""Self-Steering Optimization for chat models on Lightning."""

from sso_lightning.version import __version__

__all__ = ["__version__"]

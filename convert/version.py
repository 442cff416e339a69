"""The version of mtt."""

__version__ = "0.1.0"

"""Everything that makes two runs differ, decided with NumPy before a framework sees it."""

__version__ = "0.1.0"

"""Bytes on disk: never half written, never executed."""

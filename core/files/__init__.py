"""Reads and writes files: none is left half written, and no content is executed."""

"""Somebody else's names and layouts, and how they become canonical."""

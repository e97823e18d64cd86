"""Trains one run from its first check to its result, or one spec on several backends."""

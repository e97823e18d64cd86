"""One run from its first check to its result, and one spec on several backends."""

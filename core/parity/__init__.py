"""The proof that two backends compute the same: ``trace`` records and ``compare`` compares."""

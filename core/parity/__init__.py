"""Proof that two realisations compute the same: ``trace`` records, ``compare`` judges."""

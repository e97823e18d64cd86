"""The page docs/results.md: what it holds, how it is measured, and its text."""

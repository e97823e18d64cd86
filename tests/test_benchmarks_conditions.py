"""What the figures of a benchmark depend on is told beside them."""

import platform

import numpy as np

from triptych.core.benchmarks import conditions


def test_the_line_of_a_table_has_rounds_threads_and_versions_of_what_is_installed():
    found = conditions.conditions(5, 1, ["numpy", "no-such-package"])
    assert found["versions"] == {"python": platform.python_version(), "numpy": np.__version__}
    versions = f"python {platform.python_version()}, numpy {np.__version__}"
    assert conditions.line(found, of=" for each worker") == (
        f"5 rounds, 1 thread for each worker; {versions}"
    )
    assert conditions.line(conditions.conditions(1, 2, ["numpy"])).startswith("1 round, 2 threads;")

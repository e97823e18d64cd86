"""Where an engine computes; this version runs one process."""

from triptych.core.contracts import Context


def context(device: str, precision: str) -> Context:
    """The context of a run in one process: on the CPU its host waits for each step."""
    return Context(device, precision, runs_ahead=device != "cpu")

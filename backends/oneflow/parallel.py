"""The context of an engine. This version runs one process."""

from triptych.core.contracts import Context


def context(device: str, precision: str) -> Context:
    """The context of a run in one process. On the CPU, the host waits for each step."""
    return Context(device, precision, runs_ahead=device != "cpu")

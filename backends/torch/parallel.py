"""The context of an engine."""

from triptych.core.contracts import Context, Ranks


def context(device: str, precision: str, ranks: Ranks) -> Context:
    """The context of a run. A single process waits for each step on the CPU."""
    return Context(device, precision, runs_ahead=device != "cpu" or ranks.world > 1)

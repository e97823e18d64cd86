"""What the plain loops ask of their device: copies to it, mixed precision, an end of the step."""

import torch
from torch import Tensor

from triptych.core.contracts import Array


class Device:
    """A device and the precision of a loop on it."""

    def __init__(self, name: str, mixed: torch.dtype | None) -> None:
        """Takes the name that PyTorch gives to the device.

        Args:
            mixed: type of autocast; None: all is float32.
        """
        self._device, self._mixed = torch.device(name), mixed

    def send(self, array: Array) -> Tensor:
        """A tensor on the device. The host does not wait if the array is in pinned memory."""
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def autocast(self) -> torch.autocast:
        """A block in mixed precision, if that was asked for."""
        return torch.autocast(self._device.type, self._mixed, enabled=self._mixed is not None)

    def wait(self) -> None:
        """Waits for the device. On the CPU a call is complete when it returns."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

"""Some images of a source, as a source of its own."""

from PIL import Image

from triptych.core.contracts import Array
from triptych.core.data.source import Source


class Subset:
    """The images of ``source`` at ``index``; see ``core.data.source.Source``.

    Attributes:
        index: (n,) int64, the positions of the images in ``source``.
    """

    def __init__(self, source: Source, index: Array) -> None:
        self._source, self.index = source, index
        self.classes = source.classes

    def __len__(self) -> int:
        """How many images."""
        return len(self.index)

    def image(self, index: int) -> Image.Image:
        """See ``Source``."""
        return self._source.image(int(self.index[index]))

    def label(self, index: int) -> int:
        """See ``Source``."""
        return self._source.label(int(self.index[index]))

    def name(self, index: int) -> str:
        """See ``Source``."""
        return self._source.name(int(self.index[index]))

    def key(self, index: int) -> str:
        """See ``Source``."""
        return self._source.key(int(self.index[index]))

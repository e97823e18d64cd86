"""The embedded data set: scikit-learn's 1797 handwritten digits, 8 by 8 pixels, 17 grey levels."""

import numpy as np

from triptych.core.data.decode import Decoding
from triptych.core.data.source import Arrays
from triptych.core.random import stream

CLASSES = tuple("0123456789")


def digits(how: Decoding) -> tuple[Arrays, Arrays]:
    """The training and the held-out split: 1437 and 360 images.

    The split does not depend on the seed of the run, and divides each class alike: the images are
    shuffled and sorted by class, and every fifth one is held out.
    """
    # Imported here: worker processes get the arrays and need no scikit-learn.
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)
    labels = data.target.astype(np.int64)
    shuffled = stream(0, "digits/split").permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    held_out = np.sort(by_class[::5])
    rest = np.setdiff1d(by_class, held_out)
    train, test = (
        Arrays("digits", pixels[part], labels[part], CLASSES, how, part)
        for part in (rest, held_out)
    )
    return train, test

"""Features from files in the place of a model."""

import numpy as np

from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array
from triptych.core.data.source import content_digest
from triptych.core.errors import UserError
from triptych.core.evaluation.split import Catalogue, Features, Labelled
from triptych.core.evaluation.subject import Choice, Subject
from triptych.core.files.features import FeatureFile
from triptych.core.inference import PICK

ABOUT = ("spec", "weights", "step", "branch", "tokens", "interpolation", "depth")
"""What a feature file has to say about its features."""


class Stored:
    """Two feature files as the halves of a split; see ``core.evaluation.split.Halves``.

    Attributes:
        spec: as in ``Halves``.
        about: how the features were made.
    """

    def __init__(self, spec: RunSpec, bank: FeatureFile, queries: FeatureFile) -> None:
        """Takes the training images of ``bank`` and the held-out images of ``queries``.

        Raises:
            UserError: the two files do not belong together, or have no labels.
        """
        for file in (bank, queries):
            if missing := [key for key in ABOUT if key not in file.about]:
                raise UserError(f"{file.path}: does not say its {missing[0]}; export it again")
        self.spec, self.about = spec, bank.about
        self._bank, self._queries = bank.half(held_out=False), queries.half(held_out=True)
        for file in (self._bank, self._queries):
            if not file.classes or file.columns["label"].min() < 0:
                raise UserError(f"{file.path}: images without labels; nothing to evaluate with")
        if bank.classes != queries.classes:
            raise UserError(f"{queries.path}: other classes than {bank.path}")
        for key in ("branch", "tokens", "interpolation", "step", "weights"):
            if bank.about[key] != queries.about[key]:
                raise UserError(
                    f"{queries.path}: {key} {queries.about[key]}, but {bank.about[key]} in "
                    f"{bank.path}; export both from the same weights"
                )

        for name in bank.features.keys() & queries.features.keys():
            held, wanted = (file.features[name].shape[1:] for file in (queries, bank))
            if held != wanted:
                raise UserError(
                    f"{queries.path}: {name}: {_numbers(held)} an image, but {_numbers(wanted)} in "
                    f"{bank.path}; export both from the same weights"
                )

    def subject(self, choice: Choice) -> Subject:
        """The features that ``choice`` names, for a protocol.

        Raises:
            UserError: the files hold others.
        """
        asked = choice.interpolation or self.spec.augment.eval_interpolation
        for key, wanted, remedy in (
            ("branch", choice.branch, "give --branch"),
            ("tokens", choice.tokens, "give --tokens"),
            ("interpolation", asked, "set evaluate.lowshot.interpolation to"),
        ):
            held = self.about[key]
            if wanted != held and held != "all":
                raise UserError(
                    f"{self._bank.path}: holds {key} {held}, but {wanted} is asked for; {remedy} "
                    f"{held}, or export again"
                )
        return Subject(_no_images, self.about["step"], choice)

    def catalogue(self) -> Catalogue:
        """See ``core.evaluation.split.Halves``."""
        names = self._bank.columns["name"].tolist()
        return Catalogue(names.__getitem__, self._bank.columns["label"], self._bank.classes)

    def labels(self) -> tuple[Array, Array]:
        """See ``core.evaluation.split.Halves``."""
        return self._bank.columns["label"], self._queries.columns["label"]

    def features(self, subject: Subject, labelled: Array | None = None) -> Features:
        """See ``core.evaluation.split.Halves``.

        Raises:
            UserError: the files lack the layers that the subject needs.
        """
        bank = np.arange(len(self._bank.columns["label"])) if labelled is None else labelled
        queries = np.arange(len(self._queries.columns["label"]))
        return Features(
            self._labelled(self._bank, bank, subject),
            self._labelled(self._queries, queries, subject),
        )

    def _labelled(self, file: FeatureFile, index: Array, subject: Subject) -> Labelled:
        names = subject.choice.arrays(self.about["depth"])
        if lacking := [name for name in names if name not in file.features]:
            layers = ",".join(name.removeprefix("layer") for name in names)
            remedy = f"with --layers {layers}, or set evaluate.lowshot.final_norm=true"
            if lacking == ["final"]:  # which is always written
                remedy = "again"
            raise UserError(f"{file.path}: holds no {lacking[0]}; export it {remedy}")
        arrays = [file.features[name][index] for name in names]
        if self.about["tokens"] == "all":
            arrays = [PICK[subject.tokens](array) for array in arrays]
        labels: Array = file.columns["label"][index]
        pairs = zip(file.columns["name"][index].tolist(), labels.tolist(), strict=True)
        digest = content_digest(file.classes, pairs)
        return Labelled(np.hstack(arrays), labels, (), {}, digest, index)


def _numbers(shape: tuple[int, ...]) -> str:
    return f"{' x '.join(map(str, shape))} numbers"


def _no_images(images: Array) -> Array:
    """The features of a stored subject are read and never computed."""
    raise ValueError("a feature file computes no features")

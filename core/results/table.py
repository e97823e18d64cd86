"""The rows of docs/results.md: encoders, protocols, and the commands that measure them.

A measurement is one command line. Its answer is a list of evaluation rows, as ``core.runs.rows``
reads them, and a cell of the table is one number of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PRETRAINED = "pretrained"
TRAINED, INITIAL, SCRATCH, PIXELS = "trained", "initial", "scratch", "pixels"
COLUMNS = {
    TRAINED: "trained",
    INITIAL: "random initial weights",
    SCRATCH: "from scratch",
    PIXELS: "raw pixels",
}
"""Column -> its heading."""
SHARES = {"1 %": "1%", "10 %": "10%", "all": None}
"""Share of the labels in the table -> value of ``data.labelled``."""
TURNS = {"lowshot": 1, "1%": 1, "knn": 2, "10%": 3, "100%": 4}
"""Protocol of features, or share of labels -> turn of its jobs: what takes longer comes later."""
STEPS = {"1%": 300, "10%": 600}
"""Value of ``data.labelled`` -> steps of fine-tuning; the recipe has those for all labels."""
PER_CLASS: dict[str, int | str] = {"all": "all", "60 per class": 60, "10 per class": 10}
"""Labels of k-NN in the table -> value of a row's ``labels``."""
SHOTS: dict[str, int | str] = {"1 per class": 1, "2 per class": 2, "5 per class": 5, "1 %": "1%"}
"""Labels of low-shot in the table -> value of a row's ``shots``."""


@dataclass(frozen=True)
class Recipe:
    """A pretraining recipe, with ``<name>_linear`` and ``<name>_finetune`` beside it.

    Attributes:
        name: of the recipe.
        title: method and encoder in words.
    """

    name: str
    title: str


RECIPES = (
    Recipe("moco_v2/fashion_mnist", "MoCo v2, ResNet-18"),
    Recipe("moco_v3/fashion_mnist_resnet", "MoCo v3, ResNet-18"),
    Recipe("moco_v3/fashion_mnist_vit", "MoCo v3, ViT"),
    Recipe("moca/fashion_mnist", "MOCA, ViT"),
)


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        words: of the command line of ``triptych``.
        output: file of the rows that the command prints, or folder of the run that it writes.
        turn: commands with a smaller number run first.
        needs: the job whose output this one reads.
    """

    words: tuple[str, ...]
    output: Path
    turn: int = 0
    needs: "Job | None" = None

    @property
    def trains(self) -> bool:
        """Whether the output is a run's folder."""
        return self.output.suffix != ".json"


@dataclass(frozen=True)
class Cell:
    """One number of a job's answer: the ``top1`` of the row that has this value under this key.

    Attributes:
        key: of a row; empty: the run's main row.
    """

    job: Job
    key: str = ""
    value: int | str = ""

    @property
    def label(self) -> str:
        """Names the number within its job's answer."""
        return f"{self.key}={self.value}" if self.key else "last"


@dataclass(frozen=True)
class Line:
    """A row of the table.

    Attributes:
        protocol: its name in words.
        labels: the labelled images, in words.
        cells: column -> cell; a column that does not apply is absent.
    """

    protocol: str
    labels: str
    cells: dict[str, Cell]


@dataclass(frozen=True)
class Table:
    """The rows of one encoder.

    Attributes:
        title: method and encoder in words.
        pretraining: the job that trains the encoder.
        lines: its rows.
    """

    title: str
    pretraining: Job
    lines: tuple[Line, ...]


def tables(
    folder: Path, recipes: tuple[Recipe, ...] = RECIPES, extra: tuple[str, ...] = ()
) -> list[Table]:
    """The tables of all encoders. The pixels are those of the last recipe.

    Args:
        folder: of the results.
        extra: further overrides of the spec, for every command.
    """
    made = []
    for recipe in recipes:
        make = _Maker(recipe.name, recipes[-1].name, folder, extra)
        lines = (*_features(make), *_classifiers(make))
        made.append(Table(recipe.title, make.pretraining(), lines))
    return made


def cells(made: list[Table]) -> list[Cell]:
    """Every cell."""
    return [cell for table in made for line in table.lines for cell in line.cells.values()]


def jobs(made: list[Table]) -> list[Job]:
    """Every job once: the pretrainings first, then what is quick to measure."""
    measured = [cell.job for cell in cells(made)]
    every = dict.fromkeys([table.pretraining for table in made] + measured)
    return sorted(every, key=lambda job: job.turn)


@dataclass(frozen=True)
class _Maker:
    """Makes the jobs of one recipe."""

    recipe: str
    pixels: str
    folder: Path
    extra: tuple[str, ...]

    @property
    def own(self) -> Path:
        return self.folder / self.recipe.replace("/", "-")

    def pretraining(self) -> Job:
        run = self.own / PRETRAINED
        words = ("train", "-c", self.recipe, *self._overrides(), "--output", str(run))
        return Job((*words, "--resume", "auto"), run)

    def protocol(self, name: str, weights: str) -> Job:
        """A protocol on features: of the pretrained or the initial weights, or on pixels."""
        recipe, folder = (self.recipe, self.own) if weights != PIXELS else self._of_pixels
        path = str(self.own / PRETRAINED) if weights == TRAINED else weights
        words = ("eval", name, "-c", recipe, *self._overrides(), "--weights", path, "--json")
        return Job(words, folder / f"{name}-{weights}.json", TURNS[name], self._needed_by(weights))

    def pixels_classifier(self, share: str) -> Job:
        """Logistic regression of the pixels, on the images that ``data.labelled`` draws."""
        recipe, folder = self._of_pixels
        overrides = self._overrides(None, ("evaluate.lowshot.seeds=[0]",))
        words = ("eval", "lowshot", "-c", recipe, *overrides, "--shots", share)
        output = folder / f"logistic-regression{_suffix(share)}.json"
        return Job((*words, "--weights", PIXELS, "--json"), output, TURNS[share])

    @property
    def _of_pixels(self) -> tuple[str, Path]:
        return self.pixels, self.folder / PIXELS

    def classifier(self, method: str, weights: str, share: str | None) -> Job:
        """Linear probe or fine-tuning of the pretrained or the initial weights."""
        path = str(self.own / PRETRAINED) if weights == TRAINED else INITIAL
        run = self.own / f"{method}-{weights}{_suffix(share)}"
        recipe = f"{self.recipe}_{method}"
        steps = (f"train.steps={STEPS[share]}",) if method == "finetune" and share in STEPS else ()
        overrides = self._overrides(share, steps)
        words = ("eval", method, "-c", recipe, *overrides, "--weights", path)
        words = (*words, "--output", str(run), "--resume", "auto")
        return Job(words, run, TURNS[share or "100%"], self._needed_by(weights))

    def _needed_by(self, weights: str) -> Job | None:
        return self.pretraining() if weights == TRAINED else None

    def _overrides(self, share: str | None = None, own: tuple[str, ...] = ()) -> tuple[str, ...]:
        given = (*([f"data.labelled={share}"] if share else []), *own, *self.extra)
        return ("-o", *given) if given else ()


def _suffix(share: str | None) -> str:
    return f"-{share.removesuffix('%')}" if share else ""


def _features(make: _Maker) -> Iterator[Line]:
    """k-NN and low-shot. With a share of the labels, the encoder from scratch stands beside."""
    scratch = {"all": None, "60 per class": "1%", "1 %": "1%"}
    for protocol, name, key, amounts in (
        ("k-NN", "knn", "labels", PER_CLASS),
        ("low-shot", "lowshot", "shots", SHOTS),
    ):
        for labels, value in amounts.items():
            cells = {
                column: Cell(make.protocol(name, column), key, value)
                for column in (TRAINED, INITIAL, PIXELS)
            }
            if labels in scratch:
                cells[SCRATCH] = Cell(make.classifier("finetune", INITIAL, scratch[labels]))
            yield Line(protocol, labels, cells)


def _classifiers(make: _Maker) -> Iterator[Line]:
    """Probe and fine-tuning, beside training from scratch and logistic regression of pixels."""
    for labels, share in SHARES.items():
        scratch = Cell(make.classifier("finetune", INITIAL, share))
        images = share or "100%"
        pixels = Cell(make.pixels_classifier(images), "shots", images)
        yield Line(
            "linear probe",
            labels,
            {
                TRAINED: Cell(make.classifier("linear", TRAINED, share)),
                INITIAL: Cell(make.classifier("linear", INITIAL, share)),
                SCRATCH: scratch,
                PIXELS: pixels,
            },
        )
        yield Line(
            "fine-tuning",
            labels,
            {
                TRAINED: Cell(make.classifier("finetune", TRAINED, share)),
                SCRATCH: scratch,
                PIXELS: pixels,
            },
        )

"""Memory, traffic and time of a step of MoCo v3 on many cards, counted and not measured.

Letters: d copies of the model, t processes that share each copy, L tokens of an image, W width of a
ViT, r ratio of its MLPs.

Memory of a card, in bytes:
    weights: 4 for each number of student and teacher that the process has.
    gradients: 4 for each of these that is trained.
    moments: 4 for each of these and each moment (AdamW two, LARS and SGD one); a d-th part if the
        optimizer's state is shared.
    activations: of one view, since each view is differentiated by itself. A block keeps
        L W (4 + (4 + 2 r) / t) values of each image: inputs and outputs of two norms, query, key,
        value and output of attention, and two hidden layers. Recomputed blocks keep L W, and one
        of them all of it. A value has 2 bytes in bfloat16, else 4. Accumulation divides the images.
    pixels: 4 for each value of both views.

Traffic: what a process sends in a step, see ``core.benchmarks.traffic``.

Time of a step, in seconds:
    compute: 2 FLOP for each multiply-add (``core.benchmarks.cost``) / (cards x reached FLOP/s). A
        recomputed encoder passes forward once more.
    exchange: traffic of a group / bandwidth, which is that of the link between the cards of a
        machine if the whole group is in one, else that of the network. Nothing is hidden behind
        the computation.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from triptych.core import config, parameters
from triptych.core.benchmarks import cost, traffic
from triptych.core.config.spec import AdamWSpec, MocoV3Spec, RunSpec, VitSpec
from triptych.core.errors import UserError
from triptych.core.parallel.sharding import splits
from triptych.core.parameters.counts import flops

RECIPES = ("moco_v3/vit_base", "moco_v3/vit_large")
CARDS = (8, 64, 512)
LAYOUTS = ("", "shard_optimizer=true,recompute=true", "tensor=4")
OVERRIDES = ("precision=bfloat16",)


@dataclass(frozen=True)
class Machine:
    """The cards and what joins them.

    Attributes:
        node: cards in one machine.
        flops: FLOP/s that a card reaches on the networks, in units of 1e12.
        link: bytes/s that a card sends to others of its machine, in units of 1e9.
        network: bytes/s that a card sends to other machines, likewise.
    """

    node: int = 8
    flops: float = 400.0
    link: float = 300.0
    network: float = 50.0


@dataclass(frozen=True)
class Plan:
    """The figures of one layout; memory and traffic of a card in GiB, time in seconds."""

    recipe: str
    cards: int
    layout: str
    images: int
    weights: float
    gradients: float
    moments: float
    activations: float
    pixels: float
    data_traffic: float
    tensor_traffic: float
    compute: float
    exchange: float

    @property
    def memory(self) -> float:
        """All of a card's memory."""
        parts = (self.weights, self.gradients, self.moments, self.activations, self.pixels)
        return sum(parts)

    @property
    def per_second(self) -> float:
        """Images per second of all cards."""
        return self.images / (self.compute + self.exchange)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``bench scaling``."""
    parser.add_argument("-c", "--config", nargs="+", default=RECIPES, metavar="FILE")
    parser.add_argument(
        "-o",
        "--override",
        dest="overrides",
        nargs="+",
        action="extend",
        default=[],
        help=f"keys of the specs; {' '.join(OVERRIDES)} unless given",
    )
    parser.add_argument("--cards", nargs="+", type=int, default=CARDS, metavar="N")
    parser.add_argument(
        "--layouts",
        nargs="+",
        default=LAYOUTS,
        metavar="KEY=VALUE[,...]",
        help="keys of the section parallel; the copies of the model take all cards that are left",
    )
    for key, text in (
        ("node", "cards in one machine"),
        ("flops", "1e12 FLOP/s that a card reaches"),
        ("link", "1e9 bytes/s between the cards of a machine"),
        ("network", "1e9 bytes/s of a card to other machines"),
    ):
        default = getattr(Machine, key)
        parser.add_argument(f"--{key}", type=type(default), default=default, help=text)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Prints a row for each recipe, number of cards and layout."""
    machine = Machine(arguments.node, arguments.flops, arguments.link, arguments.network)
    if min(*asdict(machine).values(), *arguments.cards) <= 0:
        raise UserError("bench scaling: --cards and the figures of the machine must be positive")
    plans = [
        plan(spec_of(recipe, cards, layout, arguments.overrides), recipe, layout, machine)
        for recipe in arguments.config
        for cards in arguments.cards
        for layout in arguments.layouts
    ]
    print(json.dumps([asdict(p) for p in plans], indent=2) if arguments.json else table(plans))
    return 0


def spec_of(recipe: str, cards: int, layout: str, overrides: Sequence[str]) -> RunSpec:
    """The spec of a layout on a number of cards.

    Raises:
        UserError: the cards do not divide, or the spec contradicts itself.
    """
    keys = [pair for pair in layout.split(",") if pair]
    sharing = math.prod(
        int(pair.partition("=")[2]) for pair in keys if pair.startswith(("tensor=", "pipeline="))
    )
    if cards % sharing:
        raise UserError(f"--layouts {layout}: {cards} cards are not divisible by {sharing}")
    parallel = [f"parallel.data={cards // sharing}", *(f"parallel.{pair}" for pair in keys)]
    spec = config.load(recipe, [*OVERRIDES, *overrides, *parallel])
    if not (isinstance(spec.method, MocoV3Spec) and isinstance(spec.model, VitSpec)):
        raise UserError(f"{recipe}: only MoCo v3 of a ViT is counted")
    return spec


def plan(spec: RunSpec, recipe: str, layout: str, machine: Machine) -> Plan:
    """The figures of a spec."""
    section, gib = spec.parallel, 2**30
    cards = section.data * section.tensor
    held, trained = _numbers(spec)
    moments = 2 if isinstance(spec.optim, AdamWSpec) else 1
    owners = section.data if section.shard_optimizer else 1
    sent = traffic.least(spec)
    work = 2 * _multiply_adds(spec) * spec.train.batch_size
    bytes_per_second = {
        "replicas": machine.link if cards <= machine.node else machine.network,
        "tensor": machine.link if section.tensor <= machine.node else machine.network,
    }
    return Plan(
        recipe=recipe,
        cards=cards,
        layout=layout or "data",
        images=spec.train.batch_size,
        weights=4 * held / gib,
        gradients=4 * trained / gib,
        moments=4 * moments * trained / owners / gib,
        activations=_activations(spec) / gib,
        pixels=4 * 2 * spec.model.channels * math.prod(spec.model.size) * _share(spec) / gib,
        data_traffic=sent.get("replicas", 0.0) / gib,
        tensor_traffic=sent.get("tensor", 0.0) / gib,
        compute=work / cards / (machine.flops * 1e12),
        exchange=sum(size / (bytes_per_second[axis] * 1e9) for axis, size in sent.items()),
    )


def _share(spec: RunSpec) -> float:
    """Images of one copy."""
    return spec.train.batch_size / spec.parallel.data


def _numbers(spec: RunSpec) -> tuple[float, float]:
    """Numbers that a process holds of student and teacher, and those that it trains."""
    table, held, trained = splits(spec), 0.0, 0.0
    for param in parameters.table(spec):
        size = param.size / (1 if table[param.name].axis is None else spec.parallel.tensor)
        held += size
        trained += size * param.trainable
    return held, trained


def _activations(spec: RunSpec) -> float:
    """Bytes that the backward pass of one view keeps of the encoder."""
    model = cast(VitSpec, spec.model)
    values = (1 + math.prod(model.grid)) * model.width
    block = values * (4 + (4 + 2 * model.mlp_width / model.width) / spec.parallel.tensor)
    kept = model.depth * block
    if spec.parallel.recompute:
        kept = model.depth * values + block
    images = _share(spec) / spec.train.accumulate
    return kept * images * (2 if spec.precision in ("bfloat16", "float16") else 4)


def _multiply_adds(spec: RunSpec) -> int:
    """Multiply-adds of a step for one image."""
    again = cost.VIEWS * flops(spec) if spec.parallel.recompute else 0
    return cost.step_flops(spec) + again


def table(plans: Sequence[Plan]) -> str:
    """The plans as a table in Markdown."""
    lines = [
        "| recipe | cards | layout | weights | gradients | moments | activations | memory | "
        "sent, data | sent, tensor | compute ms | exchange ms | images/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for each in plans:
        sizes: list[Any] = [each.weights, each.gradients, each.moments, each.activations]
        sizes += [each.memory, each.data_traffic, each.tensor_traffic]
        cells = [each.recipe, each.cards, each.layout.replace(",", ", ")]
        cells += [f"{size:.2f}" for size in sizes]
        cells += [f"{1000 * seconds:.0f}" for seconds in (each.compute, each.exchange)]
        lines.append(f"| {' | '.join(map(str, cells))} | {each.per_second:,.0f} |")
    return "\n".join(lines)

"""MOCA: the order of one step over ``ops`` (arXiv 2307.09361, section 3).

Shape letters: N images of both views (view 1 first), L tokens per image, D width, K words.
"""

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add
from typing import cast

import numpy as np

from triptych.core.config.method import Round
from triptych.core.config.spec import MocaSpec, RunSpec, VitSpec
from triptych.core.contracts import (
    Array,
    Batch,
    Hyper,
    MocaModel,
    Outcome,
    Step,
    Targets,
    Tensor,
)
from triptych.core.methods import masking
from triptych.core.methods.accumulate import joined
from triptych.core.methods.exchange import averaged
from triptych.core.methods.health import EQUAL_SPREAD
from triptych.core.random import check_order, stream

FLAT = EQUAL_SPREAD
"""MOCA's pooled features are not normalised, and nearly parallel in a good run as well."""
REMEDY = "clip harder (optim.clip_norm) or let the teacher follow more slowly (method.momentum)"
CHANCE = "below {:.4f}; the level moves with the words and is logged at each step"
LOSSES = 1
WHOLE = False
TOLD_SCALE = 10.0
"""Scale (1/nat) of a bag's information about its image in ``spread``.

The scaled information is compared with ``FLAT``, so less than 0.001 nat counts as collapsed. The
feature spread is compared with ``FLAT`` without a scale.
"""

MocaStep = Step[MocaModel, MocaSpec]


def chance(spec: RunSpec) -> float:
    """The loss of one-hot codes against uniform predictions: ln K per round and loss.

    This is an upper bound. The true chance level depends on the targets: see the metric "chance".
    """
    method = cast(MocaSpec, spec.method)
    return 2.0 * (method.image_weight + method.dense_weight) * math.log(method.words)


def judged(values: Mapping[str, float]) -> float:
    """The loss of the step."""
    return values["loss"]


def spread(values: Mapping[str, float]) -> float:
    """The lesser of two spreads: that of the features, and that of the bags of words.

    The spread of the bags of words is the scaled information of a bag about its image. Without
    that information, a prediction that ignores the image reaches a low loss.
    """
    information = values["word_entropy"] - values["bow_entropy"]
    return min(values["feature_std"], TOLD_SCALE * information)


def status(values: Mapping[str, float]) -> list[str]:
    """Entropies (nats): of the mean bag of words, and the mean over single bags."""
    words, image = values["word_entropy"], values["bow_entropy"]
    return [f"word entropy {words:.2f} nats, per image {image:.2f}"]


def settled(spec: RunSpec) -> int:
    """Zero: the loss depends on the features from the first step on."""
    return 0


def draws(spec: RunSpec, step: int) -> dict[str, Array]:
    """The masks of a step, and the tokens that become words of the codebook.

    Returns:
        ``mask_ids_round1``: (2 batch, L) int64, order of each image's tokens, view 1 first.
        ``mask_ids_round2``: (2 batch, L) int64, likewise.
        ``codebook_coin``: () float64, 0 to 1. The words come from view 1 if it is below 1/2.
        ``codebook_image_perm``: (images,) int64, order of the images that words may come from.
        ``codebook_token_pick``: (words,) int64, for each new word the index of an interior token.
    """
    model, method = cast(VitSpec, spec.model), cast(MocaSpec, spec.method)
    batch, length = spec.train.batch_size, math.prod(model.grid)
    noise = stream(spec.seed, "mask", step).random((2 * batch, length))
    order = np.argsort(noise, axis=1, kind="stable")
    inner = masking.interior(model.grid, method.border)
    rng = stream(spec.seed, "codebook", step)
    return {
        "mask_ids_round1": order,
        "mask_ids_round2": masking.complementary(order, *method.rounds(length)),
        "codebook_coin": np.array(rng.random()),
        "codebook_image_perm": rng.permutation(method.word_images(batch)),
        "codebook_token_pick": rng.integers(0, len(inner), method.step_words),
    }


def check_draws(spec: RunSpec, draws: Mapping[str, Array]) -> None:
    """See ``core.contracts.Method``."""
    model, method = cast(VitSpec, spec.model), cast(MocaSpec, spec.method)
    for name in ("mask_ids_round1", "mask_ids_round2", "codebook_image_perm"):
        check_order(name, draws[name])
    round1, round2 = method.rounds(draws["mask_ids_round1"].shape[1])
    visible1 = draws["mask_ids_round1"][:, : round1.visible]
    visible2 = draws["mask_ids_round2"][:, : round2.visible]
    if (visible1[:, :, None] == visible2[:, None]).any():
        raise ValueError("mask_ids_round2: shows a token that round 1 has shown")
    inner = len(masking.interior(model.grid, method.border))
    pick = draws["codebook_token_pick"]
    if not ((pick >= 0) & (pick < inner)).all():
        raise ValueError(f"codebook_token_pick: expected 0 ... {inner - 1}")
    if not 0 <= draws["codebook_coin"] < 1:
        raise ValueError(f"codebook_coin: {draws['codebook_coin']}: expected 0 to 1")


def prepare(batch: Batch, draws: Mapping[str, Array], spec: MocaSpec) -> Batch:
    """The batch as it is."""
    return batch


def places(step: MocaStep, part: Batch, batch: Batch) -> dict[str, Array]:
    """The tokens that a step works with. n images in each of two views, view 1 first.

    Returns:
        For each round i:

        - ``visible<i>`` (2n, T): the tokens that the student sees,
        - ``decoded<i>`` (2n, M): those that the decoder predicts,
        - ``codes<i>`` (2n * M,): the latter among the tokens of all images,
        - ``pooled<i>``: what of the student's tokens makes an image's feature.

        ``interior``: the tokens that make a bag of words. With the first micro-batch ``words``, and
        with several copies of the model ``owned``: see ``_word_places``.
    """
    found: dict[str, Array] = {}
    for i, (order, size) in enumerate(_rounds(step, part), 1):
        ids = order[:, : size.decoded]
        images = np.arange(len(order))[:, None]
        patches = np.arange(1, 1 + size.visible)
        found[f"visible{i}"] = order[:, : size.visible]
        found[f"decoded{i}"] = ids
        found[f"codes{i}"] = (images * order.shape[1] + ids).reshape(-1)
        found[f"pooled{i}"] = patches if step.spec.pooling == "mean" else np.arange(1)
    inner = masking.interior(step.model.grid, step.spec.border)
    words = _word_places(step, inner, batch) if part.first == batch.first else {}
    return {**found, "interior": inner, **words}


def _word_places(step: MocaStep, inner: Array, batch: Batch) -> dict[str, Array]:
    """Where the new words come from.

    The copy of the model that has the image gives the word. The other copies give any word.

    Args:
        inner: the interior tokens.

    Returns:
        ``words`` (words,): tokens of this copy of the model.
        ``owned`` (words,): which of the words that all copies give are taken.
    """
    draws = step.draws
    token = inner[draws["codebook_token_pick"]]
    count, length = len(batch.index), draws["mask_ids_round1"].shape[1]
    owner, image = np.divmod(draws["codebook_image_perm"][: len(token)], count)
    if draws["codebook_coin"] >= 0.5:
        image = image + count
    found = {"words": image * length + token}
    if step.replicas.count > 1:
        found["owned"] = owner * len(token) + np.arange(len(token))
    return found


def targets(step: MocaStep, parts: Sequence[Batch]) -> Targets:
    """Updates the teacher, and computes what the student predicts and the codebook needs.

    Returns:
        For each micro-batch: ``bows`` (N, K), the bag of words of each image's other view;
        ``codes1`` and ``codes2`` (N * M, K), the codes of the tokens that a round decodes. To keep
        are the new words, and each view's difference of cosines.
    """
    ops, model = step.ops, step.model
    # The teacher takes the student's weights from before this step's update.
    model.update_teacher(step.hyper.ema)
    tokens = [model.teacher_tokens(ops.concat(part.views, axis=0)) for part in parts]
    assigned = [_assign(step, part, x) for part, x in zip(parts, tokens, strict=True)]
    values = [value for value, _ in assigned]
    difference = joined(ops, [x for _, x in assigned], parts)
    half = len(difference) // 2
    means = [difference[:half].mean(), difference[half:].mean()]
    difference1, difference2 = averaged(ops, step.replicas, means)
    kept = {
        "words": _new_words(step, parts, joined(ops, tokens, parts)),
        "difference1": difference1,
        "difference2": difference2,
    }
    bows = joined(ops, [value["bows"] for value in values], parts)
    codes = [value["codes2"] for value in values]
    metrics = _word_metrics(step, bows, codes) if step.monitored else {}
    return Targets(values, metrics, {"cross_view_bows": bows}, kept)


def _assign(step: MocaStep, part: Batch, tokens: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The targets of a micro-batch, and its tokens' difference of cosines (N,).

    Args:
        tokens: (N, L, D), of the teacher.
    """
    ops, spec, memory = step.ops, step.spec, step.model.memory
    codes, differences = ops.soft_assign(
        tokens, memory.words, spec.inverse_delta / memory.distance_used
    )
    bows = ops.mean_tokens(codes, part.places["interior"])
    half = len(bows) // 2
    # Each code sums to 1, and so does a mean of codes: no normalisation is needed.
    values = {"bows": ops.concat([bows[half:], bows[:half]], axis=0)}
    for name in ("codes1", "codes2"):
        values[name] = ops.gather_tokens(codes, part.places[name])
    return values, differences


def _new_words(step: MocaStep, parts: Sequence[Batch], tokens: Tensor) -> Tensor:
    """The words that enter the codebook, unit rows. tokens: (n, L, D), of this copy's teacher."""
    places = parts[0].places
    given = step.replicas.gather(step.ops.gather_tokens(tokens, places["words"]))
    if step.replicas.count > 1:
        given = step.ops.gather_rows(given, places["owned"])
    return step.ops.l2_normalize(given, eps=1e-5)


def predict(step: MocaStep, part: Batch, number: int) -> list[tuple[Tensor, Tensor]]:
    """The student's features in both masking rounds.

    Returns:
        For each round the features of the images (N, D), and those of the decoded tokens
        (N * M, decoder width).
    """
    ops, model = step.ops, step.model
    images = ops.concat(part.views, axis=0)
    places = part.places
    encoded = [model.encode(images, places[f"visible{i}"]) for i in (1, 2)]
    pooled = [ops.mean_tokens(last, places[f"pooled{i}"]) for i, (_, last) in enumerate(encoded, 1)]
    decoded = [
        model.decode(x, early, places[f"decoded{i}"])
        for i, (x, (early, _)) in enumerate(zip(pooled, encoded, strict=True), 1)
    ]
    return list(zip(pooled, decoded, strict=True))


def loss(
    step: MocaStep,
    part: Batch,
    features: Sequence[tuple[Tensor, Tensor]],
    targets: Mapping[str, Tensor],
    number: int,
) -> Outcome:
    """The image loss and the dense loss of both rounds.

    Args:
        features: of ``predict``.
        targets: an entry of the ``values`` of ``targets``.
    """
    ops, spec, words = step.ops, step.spec, step.model.memory.words
    pooled, decoded = zip(*features, strict=True)
    weights = step.model.image_weights(words)
    image_losses = [
        ops.kl_divergence(targets["bows"], ops.matmul(x, weights, transpose_b=True)) for x in pooled
    ]
    weights = step.model.dense_weights(words)
    dense_losses = [
        ops.kl_divergence(targets[f"codes{i}"], ops.matmul(x, weights, transpose_b=True))
        for i, x in enumerate(decoded, 1)
    ]
    # Each loss is twice its mean over the two rounds: the factor and the mean cancel.
    image, dense = image_losses[0] + image_losses[1], dense_losses[0] + dense_losses[1]
    total = spec.image_weight * image + spec.dense_weight * dense
    pools = {"x_cls_round1": pooled[0], "x_cls_round2": pooled[1]}
    return Outcome(total, {"loss_img": image, "loss_loc": dense}, pools)


def finish(model: MocaModel, outcome: Outcome, hyper: Hyper) -> None:
    """Puts tokens of this step's teacher into the codebook.

    The backward pass is done by then, so the old words are no longer needed.
    """
    kept = outcome.kept
    model.memory.update(kept["words"], (kept["difference1"], kept["difference2"]))


def _rounds(step: MocaStep, part: Batch) -> list[tuple[Array, Round]]:
    """The order of the tokens of a micro-batch's images (N, L) in each round, with its sizes."""
    orders = [step.draws[f"mask_ids_round{i}"] for i in (1, 2)]
    length = orders[0].shape[1]
    by_view = [order.reshape(2, -1, length)[:, part.rows] for order in orders]
    chosen = [order.reshape(-1, length) for order in by_view]
    return list(zip(chosen, step.spec.rounds(length), strict=True))


def _word_metrics(step: MocaStep, bows: Tensor, codes: Sequence[Tensor]) -> dict[str, Tensor]:
    """Metrics that show whether the assignments still distinguish images and tokens.

    Args:
        bows: (rows, K), bags of words.
        codes: of each micro-batch, (rows, K), codes of tokens.

    Returns:
        ``word_entropy``: nats, of the mean bag of words; ln K if all words are used equally.
        ``bow_entropy``: nats, mean over single bags.
        ``code_entropy``: nats, mean over single tokens.
        ``chance``: the loss of the best prediction that ignores the image.
    """
    ops, spec = step.ops, step.spec
    code, mean = _mean([ops.entropy(x) for x in codes]), _mean([x.mean(0) for x in codes])
    local = [bows.mean(0), ops.entropy(bows), mean, code]
    mean_bow, bow, mean, code = averaged(ops, step.replicas, local)
    words = ops.entropy(mean_bow[None])
    image, dense = words - bow, ops.entropy(mean[None]) - code
    return {
        "word_entropy": words,
        "bow_entropy": bow,
        "code_entropy": code,
        "chance": 2.0 * (spec.image_weight * image + spec.dense_weight * dense),
    }


def _mean(values: Sequence[Tensor]) -> Tensor:
    """The mean of tensors of one shape."""
    return values[0] if len(values) == 1 else reduce(add, values) / len(values)

"""MOCA: the order of one step over ``ops`` (arXiv 2307.09361, section 3).

Shape letters: N images of both views (view 1 first), L tokens per image, D width, K words.
"""

import math
from collections.abc import Mapping
from typing import cast

import numpy as np

from triptych.core.config.spec import MocaSpec, RunSpec, VitSpec
from triptych.core.contracts import Array, Batch, Hyper, MocaModel, Ops, Outcome, Tensor
from triptych.core.methods import masking
from triptych.core.methods.health import EQUAL_SPREAD
from triptych.core.random import check_order, stream

FLAT = EQUAL_SPREAD
"""MOCA's pooled features are not normalised, and nearly parallel in a good run as well."""
REMEDY = "clip harder (optim.clip_norm) or let the teacher follow more slowly (method.momentum)"
CHANCE = "below {:.4f}; the level moves with the words and is logged at each step"
TOLD_SCALE = 10.0
"""Scale (1/nat) of a bag's information about its image in ``spread``.

The scaled information is compared with ``FLAT``, so less than 0.001 nat counts as collapsed. The
feature spread is compared with ``FLAT`` without a scale.
"""


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


def forward(
    ops: Ops,
    model: MocaModel,
    batch: Batch,
    draws: Mapping[str, Array],
    hyper: Hyper,
    spec: MocaSpec,
) -> Outcome:
    """Updates the teacher, computes its codes, then the student's two masking rounds and losses.

    Args:
        batch: two views (batch, C, H, W).
    """
    images = ops.concat(batch.views, axis=0)
    orders = [draws["mask_ids_round1"], draws["mask_ids_round2"]]
    with ops.no_grad():
        # The teacher takes the student's weights from before this step's update.
        model.update_teacher(hyper.ema)
        codes, bows, kept = targets(ops, model, images, draws, spec)
    rounds = spec.rounds(orders[0].shape[1])
    encoded = [
        model.encode(images, ids[:, : size.visible])
        for ids, size in zip(orders, rounds, strict=True)
    ]
    pooled = [_pool(ops, last, spec) for _, last in encoded]
    weights = model.image_weights(model.memory.words)
    image_losses = [
        ops.kl_divergence(bows, ops.matmul(x, weights, transpose_b=True)) for x in pooled
    ]
    decoded = [
        model.decode(x, early, ids[:, : size.decoded])
        for x, (early, _), ids, size in zip(pooled, encoded, orders, rounds, strict=True)
    ]
    weights = model.dense_weights(model.memory.words)
    dense_targets = [
        _at(ops, codes, ids[:, : size.decoded]) for ids, size in zip(orders, rounds, strict=True)
    ]
    dense_losses = [
        ops.kl_divergence(target, ops.matmul(x, weights, transpose_b=True))
        for x, target in zip(decoded, dense_targets, strict=True)
    ]
    # Each loss is twice its mean over the two rounds: the factor and the mean cancel.
    image, dense = image_losses[0] + image_losses[1], dense_losses[0] + dense_losses[1]
    with ops.no_grad():
        metrics = {
            "loss_img": image,
            "loss_loc": dense,
            **_word_metrics(ops, bows, dense_targets[1], spec),
        }
    features = {"x_cls_round1": pooled[0], "x_cls_round2": pooled[1], "cross_view_bows": bows}
    loss = spec.image_weight * image + spec.dense_weight * dense
    return Outcome(loss, metrics, features, kept)


def targets(
    ops: Ops, model: MocaModel, images: Tensor, draws: Mapping[str, Array], spec: MocaSpec
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The targets of the student, and the data for the codebook's update.

    Returns:
        codes: (N, L, K), codes of each token.
        bows: (N, K), bag of words of each image's other view.
        kept: new words, and each view's difference of cosines, for ``finish``.
    """
    memory = model.memory
    tokens = model.teacher_tokens(images)
    codes, differences = ops.soft_assign(
        tokens, memory.words, spec.inverse_delta / memory.distance_used
    )
    half, inner = len(images) // 2, masking.interior(model.grid, spec.border)
    bows = ops.mean_tokens(codes, inner)
    # Each code sums to 1, and so does a mean of codes: no normalisation is needed.
    crossed = ops.concat([bows[half:], bows[:half]], axis=0)
    token = inner[draws["codebook_token_pick"]]
    image = draws["codebook_image_perm"][: len(token)]
    if draws["codebook_coin"] >= 0.5:
        image = image + half
    words = ops.l2_normalize(ops.gather_tokens(tokens, image, token), eps=1e-5)
    kept = {
        "words": words,
        "difference1": differences[:half].mean(),
        "difference2": differences[half:].mean(),
    }
    return codes, crossed, kept


def finish(model: MocaModel, outcome: Outcome, hyper: Hyper) -> None:
    """Puts tokens of this step's teacher into the codebook.

    The backward pass is done by then, so the old words are no longer needed.
    """
    kept = outcome.kept
    model.memory.update(kept["words"], (kept["difference1"], kept["difference2"]))


def _pool(ops: Ops, tokens: Tensor, spec: MocaSpec) -> Tensor:
    """The student's feature of each image. (N, 1+T, D) -> (N, D)."""
    patches = np.arange(1, tokens.shape[1])
    return ops.mean_tokens(tokens, patches if spec.pooling == "mean" else np.arange(1))


def _at(ops: Ops, codes: Tensor, ids: Array) -> Tensor:
    """The codes of the tokens ``ids``, image by image. (N, L, K), (N, M) -> (N * M, K)."""
    count, length = ids.shape
    with ops.no_grad():
        return ops.gather_tokens(codes, np.repeat(np.arange(count), length), ids.reshape(-1))


def _word_metrics(ops: Ops, bows: Tensor, codes: Tensor, spec: MocaSpec) -> dict[str, Tensor]:
    """Metrics that show whether the assignments still distinguish images and tokens.

    Args:
        bows: (rows, K), bags of words.
        codes: (rows, K), codes of tokens.

    Returns:
        ``word_entropy``: nats, of the mean bag of words; ln K if all words are used equally.
        ``bow_entropy``: nats, mean over single bags.
        ``code_entropy``: nats, mean over single tokens.
        ``chance``: the loss of the best prediction that ignores the image.
    """
    words, bow, code = ops.entropy(bows.mean(0)[None]), ops.entropy(bows), ops.entropy(codes)
    image, dense = words - bow, ops.entropy(codes.mean(0)[None]) - code
    return {
        "word_entropy": words,
        "bow_entropy": bow,
        "code_entropy": code,
        "chance": 2.0 * (spec.image_weight * image + spec.dense_weight * dense),
    }

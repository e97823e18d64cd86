"""MOCA: the order of one step over ``ops`` (arXiv 2307.09361, section 3).

Shape letters: N images of both views (view 1 first), L tokens of an image, D width, K words.
"""

import math
from collections.abc import Mapping
from typing import cast

import numpy as np

from triptych.core.config.spec import MocaSpec, RunSpec, VitSpec
from triptych.core.contracts import Array, Hyper, MocaModel, Ops, Outcome, Tensor
from triptych.core.methods import masking
from triptych.core.methods.health import EQUAL_SPREAD
from triptych.core.random import check_order, stream

FLAT = EQUAL_SPREAD
"""Its features are pooled, not normalised, and nearly parallel in a good run as well."""
REMEDY = "clip harder (optim.clip_norm) or let the teacher follow more slowly (method.momentum)"
CHANCE = "below {:.4f}; it moves with the words, and each logged step says where it is"
TOLD_SCALE = 10.0
"""Makes a thousandth of a nat that words tell about their image as little as equal features."""


def chance(spec: RunSpec) -> float:
    """The loss when sure codes meet even predictions: ln K for each of two rounds of both losses.

    An upper bound to begin with; the real one depends on the targets and comes as a metric.
    """
    method = cast(MocaSpec, spec.method)
    return 2.0 * (method.image_weight + method.dense_weight) * math.log(method.words)


def spread(values: Mapping[str, float]) -> float:
    """The features', or that of the bags of words where that is less.

    Words that tell nothing about their image make a loss that can be met without looking at it.
    """
    told = values["word_entropy"] - values["bow_entropy"]
    return min(values["feature_std"], TOLD_SCALE * told)


def status(values: Mapping[str, float]) -> list[str]:
    """Entropies, in nats: of the mean bag of words, and the mean over single bags."""
    words, image = values["word_entropy"], values["bow_entropy"]
    return [f"words {words:.2f} nats, of an image {image:.2f}"]


def settled(spec: RunSpec) -> int:
    """From the first step on the loss tells something."""
    return 0


def draws(spec: RunSpec, step: int) -> dict[str, Array]:
    """Which tokens are masked, and which enter the codebook.

    Returns:
        ``mask_ids_round1``, ``mask_ids_round2``: (2 batch, L) int64, orders of each image's
        tokens, view 1 first. ``codebook_coin``: (), the words come from view 1 if below 1/2.
        ``codebook_image_perm``: order of the images that words may come from.
        ``codebook_token_pick``: for each new word one of the interior tokens, row-major.
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
    """See ``moco.check_draws``."""
    model, method = cast(VitSpec, spec.model), cast(MocaSpec, spec.method)
    one, two = draws["mask_ids_round1"], draws["mask_ids_round2"]
    for name in ("mask_ids_round1", "mask_ids_round2", "codebook_image_perm"):
        check_order(name, draws[name])
    shown, shown_then = (
        ids[:, : r.visible] for ids, r in zip((one, two), method.rounds(one.shape[1]), strict=True)
    )
    if (shown[:, :, None] == shown_then[:, None]).any():
        raise ValueError("mask_ids_round2: shows a token that round 1 has shown")
    inner = len(masking.interior(model.grid, method.border))
    pick = draws["codebook_token_pick"]
    if not ((pick >= 0) & (pick < inner)).all():
        raise ValueError(f"codebook_token_pick: expected 0 ... {inner - 1}")
    if not 0 <= draws["codebook_coin"] < 1:
        raise ValueError(f"codebook_coin: {draws['codebook_coin']}: expected 0 to 1")


def forward(
    ops: Ops,
    model: MocaModel,
    views: tuple[Tensor, ...],
    draws: Mapping[str, Array],
    hyper: Hyper,
    spec: MocaSpec,
) -> Outcome:
    """EMA, teacher and its codes, then the student once for each masking round, then both losses.

    Args:
        views: two of (batch, C, H, W).
    """
    images = ops.concat(views, axis=0)
    orders = [draws["mask_ids_round1"], draws["mask_ids_round2"]]
    with ops.no_grad():
        # The teacher takes the student's weights from before this step's update.
        model.update_teacher(hyper.ema)
        codes, bows, kept = targets(ops, model, images, draws, spec)
    rounds = spec.rounds(orders[0].shape[1])
    seen = [
        model.encode(images, ids[:, : one.visible]) for ids, one in zip(orders, rounds, strict=True)
    ]
    pooled = [_pool(ops, last, spec) for _, last in seen]
    weights = model.image_weights(model.memory.words)
    image_losses = [
        ops.kl_divergence(bows, ops.matmul(x, weights, transpose_b=True)) for x in pooled
    ]
    decoded = [
        model.decode(x, early, ids[:, : one.decoded])
        for x, (early, _), ids, one in zip(pooled, seen, orders, rounds, strict=True)
    ]
    weights = model.dense_weights(model.memory.words)
    wanted = [
        _at(ops, codes, ids[:, : one.decoded]) for ids, one in zip(orders, rounds, strict=True)
    ]
    dense_losses = [
        ops.kl_divergence(target, ops.matmul(x, weights, transpose_b=True))
        for x, target in zip(decoded, wanted, strict=True)
    ]
    # Twice the mean of two rounds.
    image, dense = image_losses[0] + image_losses[1], dense_losses[0] + dense_losses[1]
    with ops.no_grad():
        metrics = {"loss_img": image, "loss_loc": dense, **_spread(ops, bows, wanted[1], spec)}
    features = {"x_cls_round1": pooled[0], "x_cls_round2": pooled[1], "cross_view_bows": bows}
    loss = spec.image_weight * image + spec.dense_weight * dense
    return Outcome(loss, metrics, features, kept)


def targets(
    ops: Ops, model: MocaModel, images: Tensor, draws: Mapping[str, Array], spec: MocaSpec
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What the student is to predict, and what the codebook learns from the step.

    Returns:
        (N, L, K) codes of each token; (N, K) bags of words of each image's other view; new words
        and each view's difference of cosines.
    """
    memory = model.memory
    tokens = model.teacher_tokens(images)
    codes, differences = ops.soft_assign(
        tokens, memory.words, spec.inverse_delta / memory.distance_used
    )
    half, inner = len(images) // 2, masking.interior(model.grid, spec.border)
    bows = ops.mean_tokens(codes, inner)
    # Codes sum to 1, and so do their means: dividing by the sum would change nothing.
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


def finish(model: MocaModel, outcome: Outcome) -> None:
    """Tokens of this step's teacher enter the codebook, which the gradients no longer need."""
    kept = outcome.kept
    model.memory.update(kept["words"], (kept["difference1"], kept["difference2"]))


def _pool(ops: Ops, tokens: Tensor, spec: MocaSpec) -> Tensor:
    """The student's feature of each image. (N, 1+T, D) -> (N, D)."""
    patches = np.arange(1, tokens.shape[1])
    return ops.mean_tokens(tokens, patches if spec.pooling == "mean" else np.arange(1))


def _at(ops: Ops, codes: Tensor, ids: Array) -> Tensor:
    """The codes of chosen tokens, image by image. (N, L, K), (N, M) -> (N * M, K)."""
    count, length = ids.shape
    with ops.no_grad():
        return ops.gather_tokens(codes, np.repeat(np.arange(count), length), ids.reshape(-1))


def _spread(ops: Ops, bows: Tensor, codes: Tensor, spec: MocaSpec) -> dict[str, Tensor]:
    """Whether the assignments still tell images and tokens apart. Both of (rows, K).

    Returns:
        ``word_entropy``: nats, of the mean bag of words; ln K when all words are used alike.
        ``bow_entropy``, ``code_entropy``: nats, mean of single bags and of single tokens.
        ``chance``: the loss of the best prediction that does not look at the image.
    """
    words, bow, code = ops.entropy(bows.mean(0)[None]), ops.entropy(bows), ops.entropy(codes)
    told, told_densely = words - bow, ops.entropy(codes.mean(0)[None]) - code
    return {
        "word_entropy": words,
        "bow_entropy": bow,
        "code_entropy": code,
        "chance": 2.0 * (spec.image_weight * told + spec.dense_weight * told_densely),
    }

"""Random worlds for the study of section 6, which both layers take as plain arrays.

A world has X prompts with Y responses each. A response has features: its qualities and, last, its
length. The true reward is linear in the features, plus a part of its own for each response. The
reference writes both responses of a pair, and Bradley-Terry labels them by the true reward. D_rho
is a subsample of B pairs whose longer response is preferred in a share rho of them.
"""

from typing import NamedTuple

import numpy as np

from reference.loglinear import log_softmax
from reference.objectives import bradley_terry

BIASES = (0.2, 0.4, 0.5, 0.6, 0.8)  # section 6.1's B, one reward model of the ensemble for each


class Settings(NamedTuple):
    """The size of a world, and what is varied between studies.

    Attributes:
        prompts, responses, qualities: The numbers of prompts, of responses to each, of qualities.
        length_weight: The true reward of one standard deviation of length, in nats. At 0.6 the
            longer response is preferred in 61% of the pairs, as in section 6.1.
        idiosyncrasy: The standard deviation of the reward that no feature explains, in nats.
        pairs: B, the number of pairs in D_rho.
    """

    prompts: int = 32
    responses: int = 5
    qualities: int = 4
    length_weight: float = 0.6
    idiosyncrasy: float = 0.5
    pairs: int = 160


class World(NamedTuple):
    """A world with one D_rho, as plain arrays; stack those of several worlds to `vmap`.

    Attributes:
        ref_logps: log pi_ref [X, Y], in nats.
        rewards: The true rewards [X, Y], in nats.
        features: What reward models see of each response [X, Y, F].
        pairs: D_rho, (prompt, chosen, rejected) indices [B, 3].
        subsets: 1 for the pairs of D_{rho,b}, else 0, for each b of `BIASES` [K, B].
    """

    ref_logps: np.ndarray
    rewards: np.ndarray
    features: np.ndarray
    pairs: np.ndarray
    subsets: np.ndarray


def draw_world(seed, rho, settings):
    """A random world and its D_rho. Worlds of one seed and one size differ in D_rho alone.

    r = w . qualities + c length + s noise,  |w| = 1

    Args:
        seed: of the world.
        rho: the share of pairs whose longer response is preferred, between 0 and 1.
        settings: the world's `Settings`; c is `length_weight` and s is `idiosyncrasy`.

    Returns:
        A `World`.
    Raises:
        ValueError: the pool has too few pairs of one kind, since the reward and rho differ much.
    Source: section 6.1.
    """
    rng, shape = np.random.default_rng(seed), (settings.prompts, settings.responses)
    features = rng.normal(size=(*shape, settings.qualities + 1))
    taste = rng.normal(size=settings.qualities)
    taste = np.append(taste / np.linalg.norm(taste), settings.length_weight)
    rewards = features @ taste + settings.idiosyncrasy * rng.normal(size=shape)
    ref_logps = log_softmax(0.5 * rng.normal(size=shape))
    pool = draw_pairs(rng, ref_logps, rewards, 10 * settings.pairs)
    kept = biased_subset(rng, longer_preferred(features, pool), rho, settings.pairs)
    subsets = biased_subsets(rng, longer_preferred(features, pool[kept]))
    return World(ref_logps, rewards, features, pool[kept], subsets)


def draw_pairs(rng, ref_logps, rewards, size):
    """Labelled pairs of different responses, both written by the reference.

    p(x, y_w, y_l) = 1/X p(y_w > y_l) pi_ref(y_w) pi_ref(y_l) / Z_x,  y_w != y_l

    Args:
        rng: a NumPy generator.
        ref_logps: log pi_ref [X, Y], in nats.
        rewards: r [X, Y], in nats.
        size: the number of pairs.

    Returns:
        (prompt, chosen, rejected) indices [size, 3].
    Source: Eq. 2; section 6.1's relabelling by the oracle.
    """
    preferred = np.exp(-bradley_terry(rewards[:, :, None] - rewards[:, None, :]))  # Eq. 2
    weights = preferred * np.exp(ref_logps[:, :, None] + ref_logps[:, None, :])
    weights *= 1 - np.eye(ref_logps.shape[1])
    weights /= len(weights) * np.sum(weights, axis=(1, 2), keepdims=True)
    cells = rng.choice(weights.size, size, p=weights.ravel())
    return np.transpose(np.unravel_index(cells, weights.shape))


def longer_preferred(features, pairs):
    """Whether the longer response is the preferred one, for each pair.

    Args:
        features: [X, Y, F], of which the last is the length.
        pairs: (prompt, chosen, rejected) indices [B, 3].

    Returns:
        Booleans [B].
    """
    prompts, chosen, rejected = pairs.T
    return features[prompts, chosen, -1] > features[prompts, rejected, -1]


def biased_subset(rng, longer, bias, size):
    """A random subset in which a share `bias` of the pairs prefers the longer response.

    Args:
        rng: a NumPy generator.
        longer: whether each pair prefers the longer response, Booleans [M].
        bias: the share, between 0 and 1; `bias * size` is rounded to a whole pair.
        size: the number of pairs to take.

    Returns:
        Indices of the pairs [size].
    Raises:
        ValueError: there are too few pairs of one kind.
    Source: section 6.1, D_rho.
    """
    count = round(bias * size)
    if count > np.sum(longer) or size - count > np.sum(~longer):
        raise ValueError(f"of {len(longer)} pairs, {np.sum(longer)} prefer the longer response: no "
                         f"{size} pairs have a share of {bias:g}")  # fmt: skip
    kinds = (np.flatnonzero(longer), count), (np.flatnonzero(~longer), size - count)
    return np.concatenate([rng.choice(kind, number, replace=False) for kind, number in kinds])


def biased_subsets(rng, longer):
    """The largest subset of D_rho for each length bias of the ensemble.

    Its size depends on rho, b and B alone. For rho .2 and b .8 it is B / 4.

    Args:
        rng: a NumPy generator.
        longer: whether each pair of D_rho prefers the longer response, Booleans [B].

    Returns:
        1 for the pairs of D_{rho,b}, else 0 [K, B].
    Source: section 6.1, D_{rho,b}.
    """
    total = np.sum(longer)
    subsets = np.zeros((len(BIASES), len(longer)))
    for subset, bias in zip(subsets, BIASES, strict=True):
        size = int(min(total / bias, (len(longer) - total) / (1 - bias)) + 1e-9)
        subset[biased_subset(rng, longer, bias, size)] = 1
    return subsets


def stacked(worlds):
    """Worlds as one `World` whose arrays have a leading axis.

    Args:
        worlds: a list of W worlds of one size.

    Returns:
        A `World` [W, ...].
    """
    return World(*map(np.stack, zip(*worlds, strict=True)))

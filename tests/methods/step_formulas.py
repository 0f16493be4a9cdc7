"""Formulas of the methods that are interference steps and a sum, in float64, for one tensor."""

from typing import Any
from zlib import crc32

import numpy as np


def dare_of(deltas: np.ndarray, coefficient: float, drop: float, seed: int) -> np.ndarray:
    """DARE (Yu et al., section 3.1), with the mask that is drawn for a tensor called weight."""
    generator = np.random.default_rng([seed, crc32(b"weight")])
    stays = generator.random(deltas.shape, dtype=np.float32) >= drop
    return coefficient * (stays * deltas / (1 - drop)).sum(0)


def breadcrumbs_of(
    deltas: np.ndarray, coefficient: float, smallest: float, largest: float
) -> np.ndarray:
    """Model Breadcrumbs (Davari and Belilovsky, section 3): a mask of ranks."""
    merged = np.zeros(deltas[0].size)
    for delta in deltas.reshape(len(deltas), -1):
        order = np.argsort(np.abs(delta))
        stays = order[int(smallest * delta.size) : delta.size - int(largest * delta.size)]
        merged[stays] += delta[stays]
    return coefficient * merged.reshape(deltas.shape[1:])


def pcb_of(deltas: np.ndarray, coefficient: float, density: float) -> np.ndarray:
    """PCB-Merging (Du et al., section 4), of so few entries that none is clipped."""
    experts, size = len(deltas), deltas[0].size
    flat = deltas.reshape(experts, size)
    weights = []
    for delta in flat:
        magnitudes = np.abs(delta)
        normalized = (magnitudes - magnitudes.min()) / (magnitudes.max() - magnitudes.min())
        scores = np.exp(experts * normalized**2) * np.tanh(delta * flat.sum(0))
        threshold = np.sort(scores)[int(size * (1 - density))]
        weights.append(np.maximum(scores - threshold, 0) / (scores.max() - threshold))
    total = np.sum(weights, axis=0)
    merged = (weights * flat).sum(0) / np.where(total > 0, total, 1)
    return coefficient * merged.reshape(deltas.shape[1:])


def consensus_of(
    deltas: np.ndarray, coefficient: float, threshold: float, users: int
) -> np.ndarray:
    """Consensus Merging (Wang et al., sections 4.1 and 4.3)."""
    total = deltas.sum(0)
    masks = np.abs(deltas) >= threshold * np.abs(total - deltas)
    return coefficient * total * (masks.sum(0) >= users)


def sce_of(deltas: np.ndarray, coefficient: float, density: float) -> np.ndarray:
    """SCE (Wan et al., section 3.3): select, calculate, erase."""
    variance = deltas.var(0).ravel()
    selected = np.zeros(variance.size)
    selected[np.argsort(-variance)[: int(density * variance.size)]] = 1
    chosen = deltas * selected.reshape(deltas.shape[1:])
    squares = np.square(chosen).reshape(len(deltas), -1).sum(1)
    weights = (squares / squares.sum())[:, None, None]
    erased = weights * (np.sign(chosen) == np.sign(chosen.sum(0)))
    total = erased.sum(0)
    return coefficient * (erased * chosen).sum(0) / np.where(total > 0, total, 1)


STEP_CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "dare": (
        {"coefficient": 0.4, "drop": 0.6, "seed": 2},
        lambda deltas: dare_of(deltas, 0.4, 0.6, 2),
    ),
    "breadcrumbs": (
        {"coefficient": 0.4, "smallest": 0.5, "largest": 0.1},
        lambda deltas: breadcrumbs_of(deltas, 0.4, 0.5, 0.1),
    ),
    "pcb": ({"coefficient": 0.9, "density": 0.4}, lambda deltas: pcb_of(deltas, 0.9, 0.4)),
    "consensus": (
        {"coefficient": 0.4, "threshold": 0.6, "users": 2},
        lambda deltas: consensus_of(deltas, 0.4, 0.6, 2),
    ),
    # A tensor outside of layers; tests/interference has those in layers.
    "lines": ({"increase": 0.7}, lambda deltas: deltas.sum(0) / len(deltas)),
    "sce": ({"coefficient": 0.9, "density": 0.6}, lambda deltas: sce_of(deltas, 0.9, 0.6)),
}

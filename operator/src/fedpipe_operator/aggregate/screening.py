# SPDX-License-Identifier: Apache-2.0
"""Which updates count for less, or for nothing: bounds of `checks`, then the rule of `robust` (METHOD §5)."""

from collections.abc import Sequence

import numpy as np

from fedpipe_api.job import Checks, Robust

from .comparison import Comparison
from .factors import Float64
from .messages import NodeReport, Verdict
from .robust import (
    FEWEST,
    centered_clipping,
    far_cosines,
    far_norms,
    geometric_median,
    multi_krum,
    near_copies,
)


class Findings:
    """What is known of each node so far, by its index.

    `weights` are the nodes' shares of the mean, not normalised (at first their samples); `clips` shrink
    their changes.
    """

    def __init__(self, samples: Sequence[int]) -> None:
        self.weights, self.clips = np.array(samples, np.float64), np.ones(len(samples))
        self._rejected: set[int] = set()
        self._flagged: set[int] = set()
        self._reduced: set[int] = set()
        self._reasons: dict[int, str] = {}

    def reject(self, node: int, reason: str) -> None:
        """Leave an update out."""
        self._rejected.add(node)
        self._note(node, reason)

    def flag(self, node: int, reason: str) -> None:
        """Use an update, but report it."""
        self._flagged.add(node)
        self._note(node, reason)

    def clip(self, node: int, factor: float, reason: str) -> None:
        """Shrink an update's change."""
        self.clips[node] = min(factor, self.clips[node])
        self._reduced.add(node)
        self._note(node, reason)

    def clip_head(self, node: int, tensor: str) -> None:
        """Note that the change of a tensor that is trained whole was shrunk."""
        self._reduced.add(node)
        self._note(node, f"{tensor} is far longer than the others'; clipped")

    def weigh(self, node: int, weight: float, reason: str = "") -> None:
        """Give an update another weight; a reason makes it one that is clipped."""
        self.weights[node] = weight
        if reason:
            self._reduced.add(node)
            self._note(node, reason)

    def _note(self, node: int, reason: str) -> None:
        self._reasons[node] = "; ".join(filter(None, (self._reasons.get(node), reason)))

    def accepted(self) -> list[int]:
        """Return the nodes whose updates are used."""
        return [node for node in range(len(self.clips)) if node not in self._rejected]

    def reports(self, comparison: Comparison) -> list[NodeReport]:
        """Return what to report of each node; cosines are to the accepted others."""
        norms, cosines = comparison.norms, comparison.median_cosines(self.accepted())
        return [
            NodeReport(
                float(norm),
                float(cosine) if np.isfinite(cosine) else None,
                self._verdict(node),
                self._reasons.get(node, ""),
            )
            for node, (norm, cosine) in enumerate(zip(norms, cosines, strict=True))
        ]

    def _verdict(self, node: int) -> Verdict:
        if node in self._rejected:
            return "rejected"
        if node in self._flagged:
            return "flagged"
        return "clipped" if node in self._reduced else "ok"


def screen(
    checks: Checks, robust: Robust, comparison: Comparison, history: Sequence[float], findings: Findings
) -> bool:
    """Judge all updates; return whether the plain mean of those so far accepted is no longer the result.

    Args:
        checks: bounds of norm and cosine.
        robust: the rule.
        comparison: all changes as they were sent.
        history: norms of earlier updates.
        findings: what is known; updates already rejected stay so.
    """
    changed = judge_norms(checks, comparison, history, findings)
    changed |= judge_cosines(checks, comparison, findings)
    if robust.rule == "filtered-mean":
        return filter_outliers(comparison, findings) or changed
    return (robust.rule != "none" and weigh_robustly(robust, comparison, findings)) or changed


def judge_norms(checks: Checks, comparison: Comparison, history: Sequence[float], findings: Findings) -> bool:
    """Clip or reject updates longer than `maxNorm` times the running median; return whether any were.

    The median is over this round's norms and those of the history together, zeros left out.
    """
    norms = {node: float(comparison.norms[node]) for node in findings.accepted()}
    known = [norm for norm in (*history, *norms.values()) if norm > 0]
    if checks.mode == "none" or not known:
        return False
    limit = checks.max_norm * float(np.median(known))
    changed = False
    for node, norm in norms.items():
        if norm <= limit:
            continue
        changed = True
        text = f"norm {norm:.3g} is above {limit:.3g}, {checks.max_norm:g} times the running median"
        if checks.mode == "reject":
            findings.reject(node, text)
        else:
            findings.clip(node, limit / norm, f"{text}; clipped to that")
    return changed


def judge_cosines(checks: Checks, comparison: Comparison, findings: Findings) -> bool:
    """Flag or reject updates that point away from most others; return whether any are rejected."""
    accepted = findings.accepted()
    if checks.mode == "none" or len(accepted) < FEWEST:
        return False
    changed = False
    cosines = comparison.median_cosines(accepted)
    for node in accepted:
        if not cosines[node] < checks.min_cosine:
            continue
        text = f"median cosine {cosines[node]:.2f} to the others is below {checks.min_cosine:g}"
        if checks.mode == "reject":
            findings.reject(node, text)
            changed = True
        else:
            findings.flag(node, text)
    return changed


def filter_outliers(comparison: Comparison, findings: Findings) -> bool:
    """Clip changes far longer than the others; leave out those that point away or copy each other.

    Returns:
        Whether there were any.
    """
    accepted = findings.accepted()
    if len(accepted) < FEWEST:
        return False
    norms = comparison.norms[accepted]
    changed = False
    far, middle = far_norms(norms)
    for node, norm in zip(np.array(accepted)[far], norms[far], strict=True):
        changed = True
        findings.clip(
            int(node), middle / norm, f"norm {norm:.3g} is far above the others'; clipped to {middle:.3g}"
        )
    cosines = comparison.median_cosines(accepted)[accepted]
    away, middle = far_cosines(cosines)
    for node, cosine in zip(np.array(accepted)[away], cosines[away], strict=True):
        changed = True
        text = f"median cosine {cosine:.2f} to the others is far below theirs ({middle:.2f})"
        findings.reject(int(node), text)
    copies = near_copies(comparison.cosines()[np.ix_(accepted, accepted)])
    for node in np.array(accepted)[copies & ~away]:
        changed = True
        findings.reject(int(node), "nearly the same as another update, and unlike the others")
    return changed


def weigh_robustly(robust: Robust, comparison: Comparison, findings: Findings) -> bool:
    """Give the accepted updates the weights of a rule; return whether any weight changed."""
    accepted = findings.accepted()
    if len(accepted) < FEWEST:
        return False
    clips, before = findings.clips[accepted], findings.weights[accepted]
    products = comparison.complete()[np.ix_(accepted, accepted)] * np.outer(clips, clips)
    shares = before / before.sum()
    found = _coefficients(robust, products, shares)
    for node, share, new in zip(accepted, shares, found, strict=True):
        text = f"weighs {new:.2g} instead of {share:.2g} by {robust.rule}"
        if new == 0:
            findings.reject(node, f"left out by {robust.rule}")
        else:
            findings.weigh(node, float(new), text if new < share / 2 else "")
    return bool(np.any(found != shares))


def _coefficients(robust: Robust, products: Float64, shares: Float64) -> Float64:
    match robust.rule:
        case "geometric-median":
            return geometric_median(products, shares)
        case "centered-clipping":
            return centered_clipping(products, shares)
        case "multi-krum":
            return multi_krum(products, shares, int(robust.byzantine * len(shares)))
    raise AssertionError(robust.rule)

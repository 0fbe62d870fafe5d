"""Whether an update is fit to be used: as a file when it arrives, beside the others when a round closes."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fedpipe_api.job import Checks

from .factors import Float64
from .files import READABLE, Entry, MalformedFileError, read_header
from .messages import NodeReport, Verdict

BF16_EXPONENT = np.uint16(0x7F80)
"""All ones: NaN or infinity."""

_BLOCK = 1024 * 1024


class Refused(Exception):
    """A received file that is no usable update: a CamelCase reason, and one line that says what is wrong."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class NotFiniteError(Exception):
    """The update of the node with this index holds NaN or infinity."""

    def __init__(self, node: int) -> None:
        super().__init__(node)
        self.node = node


def check_update_file(path: Path, expected_shapes: Mapping[str, tuple[int, ...]], max_bytes: int) -> None:
    """Check a received file before it counts as an update; reads it once, in blocks of 1 MiB.

    Args:
        path: the file.
        expected_shapes: exactly the tensors it must hold, each float32 or bfloat16.
        max_bytes: its largest length.

    Raises:
        Refused: TooLarge, Malformed, WrongTensors, WrongType, WrongShape or NotFinite.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if size > max_bytes:
            raise Refused("TooLarge", f"the file has {size} bytes, at most {max_bytes} are allowed")
        try:
            entries = read_header(descriptor)
        except MalformedFileError as error:
            raise Refused("Malformed", f"not a safetensors file: {error}") from None
        _check_layout(entries, expected_shapes)
        _check_finite(descriptor, entries)
    finally:
        os.close(descriptor)


def _check_layout(entries: Mapping[str, Entry], expected: Mapping[str, tuple[int, ...]]) -> None:
    if missing := sorted(expected.keys() - entries.keys()):
        raise Refused("WrongTensors", f"tensor {missing[0]} is missing ({len(missing)} in all)")
    if surplus := sorted(entries.keys() - expected.keys()):
        raise Refused("WrongTensors", f"tensor {surplus[0]!r:.80} is not asked for ({len(surplus)} in all)")
    for name, entry in entries.items():
        if entry.dtype not in READABLE:
            raise Refused("WrongType", f"tensor {name} is {entry.dtype}, F32 or BF16 is wanted")
        if entry.shape != tuple(expected[name]):
            raise Refused("WrongShape", f"tensor {name} is {list(entry.shape)}, not {list(expected[name])}")


def _check_finite(descriptor: int, entries: Mapping[str, Entry]) -> None:
    buffer = bytearray(_BLOCK)
    single, half = np.frombuffer(buffer, np.float32), np.frombuffer(buffer, np.uint16)
    for name, entry in entries.items():
        position, end = entry.start, entry.start + entry.size
        while position < end:
            count = min(_BLOCK, end - position)
            if os.preadv(descriptor, [memoryview(buffer)[:count]], position) != count:
                raise Refused("Malformed", f"tensor {name} is cut short")
            if entry.dtype == "BF16":
                finite = (half[: count // 2] & BF16_EXPONENT) != BF16_EXPONENT
            else:
                finite = np.isfinite(single[: count // 4])
            if not finite.all():
                raise Refused("NotFinite", f"tensor {name} holds NaN or infinity")
            position += count


class Comparison:
    """Each node's change beside the mean change of the others, summed over tensors.

    With D_k a node's change of one tensor, w_k its weight, c_k its clip and S = Σ w c D, the mean of the
    others is O_k = (S − w_k c_k D_k) / (1 − w_k). Tensors that one node alone trained count for its norm
    only.
    """

    def __init__(self, nodes: int) -> None:
        self.squares, self._shared, self._dots, self._others = (np.zeros(nodes) for _ in range(4))

    def add(
        self,
        *,
        nodes: Sequence[int],
        weights: Float64,
        clipped: Float64,
        squares: Float64,
        dots: Float64,
        total: float,
    ) -> None:
        """Add one tensor (or matrix).

        Args:
            nodes: the indices of those that trained it; the other arrays follow their order.
            weights: w of each; 1 where no other node trained it.
            clipped: w·c.
            squares: ‖D_k‖².
            dots: <D_k, S>.
            total: ‖S‖².
        """
        place = np.array(nodes)
        self.squares[place] += squares
        rest = 1 - weights
        others = total - 2 * clipped * dots + clipped**2 * squares
        # A node alone has no others; where S is nearly all its own, the difference is rounding.
        known = (rest > 0) & (others > 1e-12 * (total + clipped**2 * squares))
        rest = np.where(known, rest, 1)
        self._shared[place] += np.where(weights < 1, squares, 0)
        self._dots[place] += np.where(known, dots - clipped * squares, 0) / rest
        self._others[place] += np.where(known, others, 0) / rest**2

    def merge(self, other: "Comparison") -> None:
        """Add another comparison of the same nodes."""
        self.squares += other.squares
        self._shared += other._shared
        self._dots += other._dots
        self._others += other._others

    @property
    def norms(self) -> Float64:
        """‖D_k‖ over all tensors."""
        return np.sqrt(self.squares)

    def cosine(self, node: int) -> float | None:
        """Return the cosine between D_k and O_k over the tensors that others trained too."""
        product = self._shared[node] * self._others[node]
        if not product > 0:
            return None
        return float(np.clip(self._dots[node] / np.sqrt(product), -1, 1))


class Findings:
    """What the checks found so far, by index of the node; changes are shrunk by the factors `clips`."""

    def __init__(self, nodes: int) -> None:
        self.clips = np.ones(nodes)
        self._rejected: set[int] = set()
        self._flagged: set[int] = set()
        self._reasons: dict[int, str] = {}

    def reject(self, node: int, reason: str) -> None:
        """Leave an update out."""
        self._rejected.add(node)
        self._note(node, reason)

    def flag(self, node: int, reason: str) -> None:
        """Use an update, but tell of it."""
        self._flagged.add(node)
        self._note(node, reason)

    def clip(self, node: int, factor: float, reason: str) -> None:
        """Shrink an update's change."""
        self.clips[node] = factor
        self._note(node, f"{reason}; clipped to that")

    def _note(self, node: int, reason: str) -> None:
        self._reasons[node] = "; ".join(filter(None, (self._reasons.get(node), reason)))

    def accepted(self) -> list[int]:
        """Return the nodes whose updates are used."""
        return [node for node in range(len(self.clips)) if node not in self._rejected]

    def report(self, node: int, norm: float, cosine: float | None) -> NodeReport:
        """Return what to tell of a node."""
        verdict: Verdict = "ok"
        if node in self._rejected:
            verdict = "rejected"
        elif node in self._flagged:
            verdict = "flagged"
        elif self.clips[node] < 1:
            verdict = "clipped"
        return NodeReport(norm, cosine, verdict, self._reasons.get(node, ""))


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
            findings.clip(node, limit / norm, text)
    return changed


def judge_cosines(checks: Checks, comparison: Comparison, findings: Findings) -> bool:
    """Flag or reject updates that point away from the mean of the others; return whether any are rejected.

    It takes two others: of two updates that disagree neither can be told to be the odd one.
    """
    accepted = findings.accepted()
    if checks.mode == "none" or len(accepted) < 3:
        return False
    changed = False
    for node in accepted:
        cosine = comparison.cosine(node)
        if cosine is None or cosine >= checks.min_cosine:
            continue
        text = f"cosine {cosine:.2f} to the mean of the others is below {checks.min_cosine:g}"
        if checks.mode == "reject":
            findings.reject(node, text)
            changed = True
        else:
            findings.flag(node, text)
    return changed

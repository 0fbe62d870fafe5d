# SPDX-License-Identifier: Apache-2.0
"""Corpus BLEU (Papineni et al. 2002): up to 4-grams, several references, closest reference length, no smoothing."""

import math
import re
from collections import Counter
from collections.abc import Sequence

ORDER = 4
_TOKEN = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Return lower-case words and punctuation marks."""
    return _TOKEN.findall(text.lower())


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return BLEU in 0..1 of each hypothesis against its references; 0 where an order has no match."""
    matched, total = [0] * ORDER, [0] * ORDER
    length = reference_length = 0
    for hypothesis, group in zip(hypotheses, references, strict=True):
        ours, theirs = words(hypothesis), [words(reference) for reference in group]
        length += len(ours)
        reference_length += min((abs(len(text) - len(ours)), len(text)) for text in theirs)[1]
        for order in range(1, ORDER + 1):
            most: Counter[tuple[str, ...]] = Counter()
            for text in theirs:
                most |= _grams(text, order)
            found = _grams(ours, order)
            matched[order - 1] += (found & most).total()
            total[order - 1] += found.total()
    if not all(matched):
        return 0.0
    precision = sum(math.log(hit / count) for hit, count in zip(matched, total, strict=True)) / ORDER
    return math.exp(precision + min(0.0, 1 - reference_length / length))


def _grams(text: list[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(text[start:] for start in range(order)), strict=False))

# SPDX-License-Identifier: Apache-2.0
"""What the federation of `attacks.py` learns: features of 20 Newsgroups, or a mixture of Gaussians."""

import gzip
import json
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WIDTH, CLASSES = 128, 20


@dataclass(frozen=True)
class Data:
    """Features (n, 128) of unit variance and labels (n,) to train on and to test with."""

    train: np.ndarray
    labels: np.ndarray
    test: np.ndarray
    truth: np.ndarray


def mixture(seed: int) -> Data:
    """Return Gaussian classes that overlap."""
    random = np.random.default_rng(seed)
    centres = 0.35 * random.standard_normal((CLASSES, WIDTH))
    parts = []
    for count in (6000, 2000):
        labels = random.integers(CLASSES, size=count)
        parts += [np.float32(centres[labels] + random.standard_normal((count, WIDTH))), labels]
    return Data(*parts)


def news(directory: Path) -> Data:
    """Return the principal components of TF-IDF of 8,192 hashed words."""
    rows, labels = {}, {}
    for part in ("train", "test"):
        with gzip.open(directory / f"{part}.jsonl.gz", "rt") as file:
            found = [json.loads(line) for line in file]
        rows[part] = [row["text"] for row in found]
        labels[part] = [row["label"] for row in found]
    names = sorted(set(labels["train"]))
    counts = {}
    for part, texts in rows.items():
        counts[part] = np.zeros((len(texts), 8192), np.float32)
        for row, text in zip(counts[part], texts, strict=True):
            for word, count in Counter(re.findall(r"[a-z]{3,}", text.lower())).items():
                row[zlib.crc32(word.encode()) % 8192] += count
    idf = np.log(len(rows["train"]) / (1 + (counts["train"] > 0).sum(0)))
    for values in counts.values():
        values[:] = np.log1p(values) * np.maximum(idf, 0)
        values[:] /= np.linalg.norm(values, axis=1, keepdims=True) + 1e-9
    sketch = counts["train"] @ np.random.default_rng(0).standard_normal((8192, 192), np.float32)
    for _ in range(3):
        sketch = counts["train"] @ (counts["train"].T @ np.linalg.qr(sketch)[0])
    _, _, right = np.linalg.svd(np.linalg.qr(sketch)[0].T @ counts["train"], full_matrices=False)
    dense = {part: (values @ right[:WIDTH].T).astype(float) for part, values in counts.items()}
    centre, spread = dense["train"].mean(0), dense["train"].std(0)
    dense = {part: (values - centre) / spread for part, values in dense.items()}
    index = {part: np.array([names.index(label) for label in found]) for part, found in labels.items()}
    return Data(np.float32(dense["train"]), index["train"], dense["test"], index["test"])

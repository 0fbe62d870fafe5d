# SPDX-License-Identifier: Apache-2.0
"""Writes a tiny BERT and this node's share of sentences to a directory of the node: `python - DIRECTORY NODE`."""

import json
import os
import random
import sys
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, set_seed

root, node = Path(sys.argv[1]), sys.argv[2]
topics = {
    "sea": ["wave", "tide", "ship", "sail", "harbour", "anchor", "salt", "gull"],
    "wood": ["tree", "leaf", "root", "bark", "moss", "owl", "fern", "acorn"],
    "town": ["street", "tram", "bridge", "market", "bell", "lamp", "square", "clock"],
}
fill = ["the", "a", "and", "of", "in", "near", "old", "new", "small", "with"]
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *fill, *(word for topic in topics.values() for word in topic)]

set_seed(0)
config = BertConfig(
    vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=64, num_labels=len(topics),
)  # fmt: skip
tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = Whitespace()
PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
).save_pretrained(root / "model")
BertForSequenceClassification(config).save_pretrained(root / "model")

chance = random.Random(node)
data = root / "data"
data.mkdir(parents=True, exist_ok=True)
with (data / "train.jsonl").open("w") as file:
    for _ in range(300):
        label = chance.choice(sorted(topics))
        text = chance.choices(topics[label], k=8) + chance.choices(fill, k=4)
        chance.shuffle(text)
        file.write(json.dumps({"text": " ".join(text), "label": label}) + "\n")
for path in (root, *root.rglob("*")):
    path.chmod(0o755 if path.is_dir() else 0o644)
os.sync()

# SPDX-License-Identifier: Apache-2.0
"""The GPT-2 of the comparison: small, pretrained here on E2E's language, as no pretrained one can be had offline.

It sees one half of E2E's training rows: meaning representations alone, and references of the same one beside each
other, so that it learns the words, the sentences and to speak of what was spoken of before; never which sentence
puts which meaning representation into words. The rows of the other half are for fine-tuning; no meaning
representation is in both.
"""

import hashlib
import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

MODEL = Path(__file__).parents[2] / "runs" / "paper-gpt2"
STEPS, BATCH, LENGTH = 1500, 24, 96
LEARNING_RATE, WARMUP = 2e-3, 100
REFERENCES = 3
"""Of a meaning representation, in one text."""

Row = dict[str, Any]


def halves(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Return the rows for pretraining and those for fine-tuning, separated by their meaning representation."""
    parts: tuple[list[Row], list[Row]] = [], []
    for row in rows:
        digest = hashlib.sha256(row["meaning_representation"].encode()).digest()
        parts[digest[0] % 2].append(row)
    return parts


def make(rows: Sequence[Row], directory: Path = MODEL) -> None:
    """Pretrain the model on the first half of E2E's rows and write it, with its tokenizer, if it is not there."""
    if (directory / "model.safetensors").is_file():
        return
    tokenizer = _tokenizer(rows)
    ids = [tokenizer(text)["input_ids"] for text in _texts(halves(rows)[0])]
    model = _model(tokenizer)
    loss = _pretrain(
        model, [[*text, tokenizer.eos_token_id][:LENGTH] for text in ids], tokenizer.pad_token_id
    )
    print(f"pretrained a GPT-2 of {model.num_parameters():,} parameters: loss {loss:.2f}", flush=True)
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)


def _texts(rows: Sequence[Row]) -> list[str]:
    """Return every meaning representation, and its references in shuffled groups."""
    references: dict[str, list[str]] = {}
    for row in rows:
        references.setdefault(row["meaning_representation"], []).append(row["reference"])
    texts, chosen = [], random.Random("texts")
    for meaning, group in references.items():
        texts.append(meaning)
        chosen.shuffle(group)
        texts += [" ".join(group[i : i + REFERENCES]) for i in range(0, len(group), REFERENCES)]
    return texts


def _tokenizer(rows: Sequence[Row]) -> Any:
    """Return a tokenizer of the words of the train split.

    A vocabulary made for all English would make logits of this model larger than all the rest of it.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for row in rows:
        for text in (row["meaning_representation"], row["reference"]):
            counts.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    words = ["[PAD]", "[UNK]", "[END]", *sorted(word for word, count in counts.items() if count > 1)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]"
    )


def _model(tokenizer: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=128,
            n_embd=256,
            n_layer=4,
            n_head=4,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _pretrain(model: Any, texts: list[list[int]], padding: int) -> float:
    """Train every parameter; return the mean loss of the last tenth of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate)
    chosen, losses = random.Random("pretrain"), []
    model.train()
    for _ in range(STEPS):
        batch = chosen.sample(texts, BATCH)
        longest = max(map(len, batch))
        ids = torch.tensor([text + [padding] * (longest - len(text)) for text in batch])
        known = torch.tensor([[i < len(text) for i in range(longest)] for text in batch])
        loss = model(ids, attention_mask=known, labels=ids.masked_fill(~known, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    last = losses[-STEPS // 10 :]
    return sum(last) / len(last)


def _rate(step: int) -> float:
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / STEPS))

# SPDX-License-Identifier: Apache-2.0
"""What TRL's SFTTrainer makes of rows, and a tokenizer with the special tokens of its stored chat templates."""

import re
import warnings
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

TEMPLATES = Path(str(distribution("trl").locate_file("trl/chat_templates")))
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Rows = list[tuple[list[int], list[int]]]
"""Of each row its token ids, and the labels: -100 where nothing is learned."""


def byte_level_bpe(texts: list[str]) -> Any:
    """Return a byte-level BPE tokenizer with the special tokens of all templates, trained on texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    templates = [path.read_text() for path in TEMPLATES.glob("*.jinja")] + [CHATML]
    special = {token for text in templates for token in re.findall(r"<[|｜]?[A-Za-z_/▁:0-9]+[|｜]?>", text)}
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=["<s>", "</s>", *sorted(special - {"<s>", "</s>"})],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_of(bpe: Any, template: str | None, **options: Any) -> Any:
    """Return the tokenizer with a chat template."""
    from transformers import PreTrainedTokenizerFast

    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", **options}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template, **tokens)


class Reference:
    """TRL's trainer, asked for what it makes of rows."""

    def __init__(self, bpe: Any, out: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from datasets import disable_progress_bars
            from transformers import LlamaConfig, LlamaForCausalLM
        disable_progress_bars()
        self._out = out
        self._model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=bpe.get_vocab_size(), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=16,
            )
        )  # fmt: skip

    def rows(self, tokenizer: Any, rows: list[dict[str, Any]], **options: Any) -> Rows:
        """Return the rows as they are trained on."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from datasets import Dataset
            from trl import SFTConfig, SFTTrainer

            settings = SFTConfig(
                output_dir=str(self._out), max_length=None, report_to="none", use_cpu=True, disable_tqdm=True,
                **options,
            )  # fmt: skip
            trainer = SFTTrainer(
                model=self._model,
                args=settings,
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
            )
        return [(list(row["input_ids"]), list(row["labels"])) for row in trainer.train_dataset]


def shifted(rows: Rows) -> Rows:
    """Return rows without the first token's label: nothing precedes it, so that nothing predicts it."""
    return [(ids, [-100, *labels[1:]]) for ids, labels in rows]

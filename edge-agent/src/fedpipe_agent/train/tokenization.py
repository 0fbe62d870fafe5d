# SPDX-License-Identifier: Apache-2.0
"""Token ids of examples, and which of them are learned: the text's, the completion's or the assistant's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np

from fedpipe_api.base import UserError

from ..errors import Stopped
from .chat_layouts import Message
from .examples import Example, Found

END = math.inf
Ids = list[int] | np.ndarray
Mask = list[bool] | np.ndarray


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids; which of them are predicted, or the class; and where a pair's second text begins.

    Samples packed into one also have each token's position in its own.
    """

    ids: Ids
    predicted: Mask | None = None
    label: int = 0
    second: int | None = None
    positions: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class _Text:
    """A text and the parts of it (begin, end) that are learned; a chat has its special tokens within."""

    example: Example
    text: str
    learned: Sequence[tuple[int, float]]
    chat: bool


class Tokenization:
    """Makes samples of examples by one tokenizer; counts bad rows and those that were cut."""

    def __init__(self, tokenizer: Any, longest: int, found: Found):
        """Keep samples within `longest` tokens."""
        self._tokenizer = tokenizer
        self._longest = longest
        self._found = found

    def classified(self, examples: Sequence[Example]) -> list[Sample]:
        """Return the samples of texts, or of pairs of texts, with classes."""
        encodings = self._encoded(examples, [(one.text, one.pair) for one in examples])
        samples = []
        for example, encoding in zip(examples, encodings, strict=True):
            if encoding is None:
                continue
            if len(encoding["input_ids"]) > self._longest:
                self._found.truncated += 1
                cut = {"truncation": True, "max_length": self._longest}
                (encoding,) = self._encoded([example], [(example.text, example.pair)], **cut)  # noqa: PLW2901
                assert encoding is not None
            ids, types = encoding["input_ids"], encoding.get("token_type_ids") or []
            second = types.index(1) if example.pair is not None and 1 in types else None
            # A tokenizer without special tokens gives nothing for an empty text.
            ids = np.array(ids or [self._tokenizer.eos_token_id], dtype=np.int32)
            samples.append(Sample(ids, None, example.label, second))
        return samples

    def learned(self, examples: Sequence[Example]) -> list[Sample]:
        """Return the samples of texts, completions and chats, each with at least one predicted token."""
        texts = []
        for example in examples:
            try:
                texts.append(self._text(example))
            except UserError as error:
                self._found.bad(error)
        samples = []
        for chat, group in groupby(texts, key=lambda text: text.chat):
            some = list(group)
            options = {"add_special_tokens": not chat, "return_offsets_mapping": self._tokenizer.is_fast}
            encodings = self._encoded(
                [one.example for one in some], [(one.text, None) for one in some], **options
            )
            for one, encoding in zip(some, encodings, strict=True):
                sample = encoding and self._sample(one, encoding)
                if sample:
                    samples.append(sample)
        return samples

    def _encoded(
        self, examples: Sequence[Example], texts: Sequence[tuple[str, str | None]], **options: Any
    ) -> list[dict[str, Any] | None]:
        """Return what the tokenizer makes of texts or pairs of texts; None of a bad row."""
        if not texts:
            return []
        pairs = [[pair for _, pair in texts]] if texts[0][1] is not None else []
        try:
            found = self._tokenizer(
                [text for text, _ in texts], *pairs, return_attention_mask=False, verbose=False, **options
            )
        except (Stopped, KeyboardInterrupt, MemoryError):
            raise
        except BaseException as error:  # a panic of its Rust is no Exception
            if len(texts) > 1:  # which one it is
                singles = zip(examples, texts, strict=True)
                return [row for one, text in singles for row in self._encoded([one], [text], **options)]
            self._found.bad(_failed(examples[0], "the tokenizer fails", error))
            return [None]
        return [{name: values[row] for name, values in found.items()} for row in range(len(texts))]

    def _text(self, example: Example) -> _Text:
        chats = getattr(self._tokenizer, "chat_template", None) is not None
        if not example.messages or (example.text and not chats):
            prompt = example.prompt or ""
            return _Text(example, prompt + example.text, [(len(prompt), END)], chat=False)
        if not chats:
            raise UserError(
                f"{example.place}: field {example.field!r} is a chat, but the model's tokenizer has no chat "
                "template; choose a chat model, or write prompt and completion as texts"
            )
        text = self._rendered(example, example.messages)
        _check_whole(example, text)
        if example.given is not None:
            prompt = self._rendered(example, example.messages[: example.given], add_generation_prompt=True)
            return _Text(example, text, [(_common(prompt, text), END)], chat=True)
        if self._marked and self._tokenizer.is_fast:
            return _Text(example, text, [], chat=True)
        turns = [
            self._turn(example, text, i) for i, m in enumerate(example.messages) if m["role"] == "assistant"
        ]
        return _Text(example, text, turns, chat=True)

    @cached_property
    def _marked(self) -> bool:
        """Whether the chat template says itself what the assistant generates."""
        template = self._tokenizer.chat_template
        texts = template.values() if isinstance(template, dict) else [template]
        return any("generation" in text and "endgeneration" in text for text in texts)

    def _rendered(self, example: Example, messages: Sequence[Message], **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tools=example.tools, **{"tokenize": False, **options}
            )
        except (Stopped, KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:  # whatever a template may do; its words may quote the row
            raise _failed(
                example, "the tokenizer's chat template does not take the messages", error
            ) from None

    def _turn(self, example: Example, text: str, index: int) -> tuple[int, int]:
        """Return where in the text the answer of one message is: after its header, with what ends it."""
        before = (
            self._rendered(example, example.messages[:index], add_generation_prompt=True) if index else ""
        )
        until = self._rendered(example, example.messages[: index + 1])
        begin = _common(before, text)
        # Some templates end what is rendered, but no earlier turn, with an end token.
        for end in (until, until.removesuffix(self._tokenizer.eos_token or "")):
            if text.startswith(end):
                return begin, len(end)
        # Templates that leave thoughts out of earlier answers.
        content = (example.messages[index].get("content") or "").rsplit("</think>", 1)[-1].strip()
        ending = until[until.rfind(content) + len(content) :]
        place = text.find(content + ending, begin) if content else -1
        if place < 0:
            where = f"{example.place}: field {example.field!r}"
            what = f"the chat template writes message {index} in another way when others follow"
            raise UserError(f"{where}: {what}; write it as prompt and completion")
        return begin, place + len(content) + len(ending)

    def _sample(self, one: _Text, encoding: dict[str, Any]) -> Sample | None:
        ids: list[int] = encoding["input_ids"]
        if one.chat and not one.learned:
            predicted = self._by_marks(one.example, ids)
        elif one.chat and one.learned[0][1] != END:
            predicted = [
                any(begin < e and s < end for begin, end in one.learned)
                for s, e in self._offsets(one, encoding)
            ]
        else:
            begin = one.learned[0][0]
            offsets = self._offsets(one, encoding) if begin else []
            first = next((i for i, (_, e) in enumerate(offsets) if e > begin), len(offsets))
            predicted = [i >= first for i in range(len(ids))]
        if not one.chat:
            self._with_ends(one.text, ids, predicted)
        if not any(predicted[1:]):
            example = one.example
            self._found.bad(
                UserError(f"{example.place}: field {example.field!r} has no token that is to be learned")
            )
            return None
        if len(ids) > self._longest:
            self._found.truncated += 1
            ids, predicted = cut(ids, predicted, self._longest, self._tokenizer.bos_token_id, one.chat)
        # As arrays: a list takes several times the memory.
        return Sample(np.array(ids, dtype=np.int32), np.array(predicted, dtype=bool))

    def _offsets(self, one: _Text, encoding: dict[str, Any]) -> list[tuple[int, int]]:
        """Return where in the text each token is."""
        if "offset_mapping" in encoding:
            return list(encoding["offset_mapping"])
        raise UserError(
            f"{one.example.place}: the model's tokenizer does not say where in a text its tokens are; "
            "use one with tokenizer.json"
        )

    def _by_marks(self, example: Example, ids: list[int]) -> list[bool]:
        """Return what the chat template itself marks as generated."""
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        found = self._rendered(example, example.messages, **options)
        return [bool(mask) for mask in found["assistant_masks"]]

    def _with_ends(self, text: str, ids: list[int], predicted: list[bool]) -> None:
        """Have one begin token at most, and one end token."""
        begin, end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if begin is not None and ids[:2] == [begin, begin]:
            del ids[0], predicted[0]
        if end is None:
            return
        if ids[-2:] == [end, end] and not text.rstrip().endswith(self._tokenizer.eos_token * 2):
            del ids[-1], predicted[-1]
        elif ids[-1:] != [end] and not text.rstrip().endswith(self._tokenizer.eos_token):
            ids.append(end)
            predicted.append(True)


def cut(
    ids: list[int], predicted: list[bool], longest: int, begin: int | None, chat: bool
) -> tuple[list[int], list[bool]]:
    """Return `longest` of the tokens with at least a part of what is predicted.

    A prompt gives way from its beginning, but for the begin token, and a completion at its end. A chat is cut
    at its end, unless its first answer begins in the second half of what is kept.
    """
    first = predicted.index(True, 1)
    if predicted[0] or (chat and first <= longest // 2):
        return ids[:longest], predicted[:longest]
    start = min(first - 1, len(ids) - longest)
    kept, targets = ids[start : start + longest], predicted[start : start + longest]
    if begin is not None and ids[0] == begin:  # in the place of the prompt's last or next token
        kept[0] = begin
    return kept, targets


def _common(prefix: str, text: str) -> int:
    """Return how many characters both begin with."""
    if text.startswith(prefix):
        return len(prefix)
    return next(
        (i for i, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), min(len(prefix), len(text))
    )


def _check_whole(example: Example, text: str) -> None:
    """Raise UserError where a template leaves out a message or function that it does not know."""
    for index, message in enumerate(example.messages):
        content = message.get("content") or ""
        said = message["role"] == "tool" or "</think>" in content or content.strip() in text
        called = all(_name(call) in text for call in message.get("tool_calls") or ())
        if not (said and called):
            raise UserError(
                f"{example.place}: the tokenizer's chat template leaves out a part of message {index} "
                f"at field {example.field!r}; choose a model trained with such messages, or change them"
            )
    if not all(_name(tool) in text for tool in example.tools or ()):
        raise UserError(
            f"{example.place}: the tokenizer's chat template leaves out the functions of field 'tools'; "
            "choose a model that is trained with tools"
        )


def _name(function: dict[str, Any]) -> str:
    """Return the name of a function or call, with or without the `function` around it."""
    return str(function.get("function", function).get("name", ""))


def _failed(example: Example, what: str, error: BaseException) -> UserError:
    return UserError(
        f"{example.place}: {what} at field {example.field!r}: {type(error).__name__}; fix or remove the row"
    )

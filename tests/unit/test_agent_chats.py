# SPDX-License-Identifier: Apache-2.0
"""Tokens and loss mask of texts, completions and chats, against TRL's SFTTrainer and by hand."""

import json
import re
from functools import partial

import pytest

from agent_fixtures import registered
from fedpipe_agent.train import data
from fedpipe_agent.train.tokenization import cut
from fedpipe_api.base import UserError
from fedpipe_api.job import Fields, Task
from standins import sft
from standins.sft import CHATML, TEMPLATES

EQUAL = [
    *("chatml", "cohere", "cohere2", "gemma", "gemma3", "lfm2", "llama3", "phi3", "phi3_5"),
    *("qwen2_5_training", "qwen2_5_vl", "qwen3_training", "qwen3_instruct_2507", "qwen3_vl"),
    *("deepseekv3_training", "glm4moe_training", "gptoss_training", "nemotron_3_nano_training"),
    *("qwen3_5_think_training", "qwen3_6_training", "llama3_training"),
]
"""TRL's stored templates for which ours and its mask are to be one; without `_training` it exchanges the template."""
NO_SYSTEM = ("gemma",)
TOOLS = ("qwen2_5_training", "qwen3_training", "qwen3_instruct_2507", "glm4moe_training")

USER = {"role": "user", "content": "What is the capital of France? é"}
ANSWER = {"role": "assistant", "content": "Paris — of course."}
CHAT = [USER, ANSWER, {"role": "user", "content": "And Spain?"}, {"role": "assistant", "content": "Madrid."}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *CHAT]
FUNCTION = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
CALLS = [
    {"role": "user", "content": "Weather in Paris?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "sunny"},
    {"role": "assistant", "content": "It is sunny."},
]


@pytest.fixture(scope="module")
def bpe():
    return sft.byte_level_bpe([json.dumps(SYSTEM + CALLS)] * 3)


@pytest.fixture
def tokenizer_of(bpe):
    return partial(sft.tokenizer_of, bpe)


@pytest.fixture(scope="module")
def trl(bpe, tmp_path_factory):
    return sft.Reference(bpe, tmp_path_factory.mktemp("trl")).rows


def load(tokenizer, directory, rows, longest=4096, **options):
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = registered(Task.CAUSAL_LM, evaluation_share=0, **options)
    source = job.data.model_copy(update={"max_length": longest})
    return data.load(directory, source, job.model, tokenizer, seed=7, longest=None)


def ours(tokenizer, directory, rows, **options):
    found = load(tokenizer, directory, rows, **options).train
    samples = [found.sample(index) for index in range(len(found))]
    return [
        (one.ids.tolist(), [int(i) if p else -100 for i, p in zip(one.ids, one.predicted, strict=True)])
        for one in samples
    ]


@pytest.mark.parametrize("name", EQUAL)
def test_chats_are_those_of_trl_token_for_token(name, tokenizer_of, trl, tmp_path):
    template = CHATML if name == "chatml" else (TEMPLATES / f"{name}.jinja").read_text()
    chats = [CHAT, CHAT[:2]] if name in NO_SYSTEM else [CHAT, CHAT[:2], SYSTEM]
    rows = [{"messages": chat} for chat in chats]
    if (
        name == "chatml"
    ):  # TRL knows no training template of it: what follows a prompt is learned, turn by turn
        rows = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats]
        assert ours(tokenizer_of(template), tmp_path, rows) == sft.shifted(trl(tokenizer_of(template), rows))
        single = [{"messages": CHAT[:2]}]
        assert (
            ours(tokenizer_of(template), tmp_path, single)[0]
            == ours(tokenizer_of(template), tmp_path, rows[1:2])[0]
        )
        return
    expected = trl(tokenizer_of(template), rows, assistant_only_loss=True)
    assert ours(tokenizer_of(template), tmp_path, rows) == sft.shifted(expected)


@pytest.mark.parametrize("name", TOOLS)
def test_tools_and_their_calls_are_those_of_trl(name, tokenizer_of, trl, tmp_path):
    template = (TEMPLATES / f"{name}.jinja").read_text()
    rows = [{"messages": CALLS, "tools": json.dumps([FUNCTION])}]
    expected = sft.shifted(trl(tokenizer_of(template), rows, assistant_only_loss=True))
    assert ours(tokenizer_of(template), tmp_path, rows) == expected
    # As services write them: arguments as JSON text, null where there is no content.
    call = {**CALL, "function": {**CALL["function"], "arguments": '{"city": "Paris"}'}}
    messages = [CALLS[0], {**CALLS[1], "content": None, "tool_calls": [call]}, *CALLS[2:]]
    assert ours(tokenizer_of(template), tmp_path, [{"messages": messages, "tools": [FUNCTION]}]) == expected


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "qwen3_instruct_2507", "phi3"])
def test_a_prompt_and_completion_of_messages_are_those_of_trl(name, tokenizer_of, trl, tmp_path):
    template = (TEMPLATES / f"{name}.jinja").read_text()
    rows = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in (CHAT, SYSTEM, CHAT[:2])]
    assert ours(tokenizer_of(template), tmp_path, rows) == sft.shifted(trl(tokenizer_of(template), rows))


def test_texts_and_completions_are_those_of_trl(tokenizer_of, trl, tmp_path):
    completions = [
        {"prompt": "What is the capital of France?", "completion": " Paris."},
        {"prompt": "What is the capital of France? ", "completion": "Paris."},
        {"prompt": "Weath", "completion": "er in Paris?</s>"},
        {"prompt": "é", "completion": "—"},
    ]
    texts = [{"text": "What is the weather?"}, {"text": "It is sunny.</s>"}, {"text": "é — "}]
    for rows in (completions, texts):
        assert ours(tokenizer_of(None), tmp_path, rows) == sft.shifted(trl(tokenizer_of(None), rows))


def decoded(tokenizer, row):
    return tokenizer.decode(row[0]), tokenizer.decode([token for token in row[1] if token >= 0])


def test_sharegpt_and_alpaca_are_chats(tokenizer_of, tmp_path):
    tokenizer = tokenizer_of(CHATML)
    expected = ours(tokenizer, tmp_path, [{"messages": SYSTEM}])
    turns = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in CHAT]
    for row in (
        {"conversations": turns, "system": "Be brief."},
        {"conversations": [{"from": "system", "value": "Be brief."}, *turns], "id": "1"},
        {
            "conversations": {
                key: [t[key] for t in [{"from": "system", "value": "Be brief."}, *turns]]
                for key in ("from", "value")
            }
        },
    ):
        assert ours(tokenizer, tmp_path, [row], format="sharegpt") == expected
    row = {"instruction": "Translate.", "input": "Hello", "output": "Hallo"}
    chat = [{"role": "user", "content": "Translate.\n\nHello"}, {"role": "assistant", "content": "Hallo"}]
    assert ours(tokenizer, tmp_path, [row], format="alpaca") == ours(
        tokenizer, tmp_path, [{"messages": chat}]
    )
    plain = decoded(tokenizer_of(None), ours(tokenizer_of(None), tmp_path, [row], format="alpaca")[0])
    assert "### Instruction:\nTranslate.\n\n### Input:\nHello\n\n### Response:\nHallo</s>" in plain[0]
    assert plain[1] == "Hallo</s>"


def test_only_the_assistant_is_learned(tokenizer_of, tmp_path):
    tokenizer = tokenizer_of(CHATML)
    (row,) = ours(tokenizer, tmp_path, [{"messages": SYSTEM}])
    assert decoded(tokenizer, row)[1] == "Paris — of course.<|im_end|>\nMadrid.<|im_end|>\n"


def test_begin_and_end_tokens_are_there_once(bpe, tmp_path):
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    special = [("<s>", bpe.token_to_id("<s>")), ("</s>", bpe.token_to_id("</s>"))]
    for single in ("<s> $A", "<s> $A </s>", "$A </s>"):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>"
        )
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=special
        )
        begin = "<s>" if "<s>" in single else ""
        for rows, learned in (
            ([{"text": "Madrid."}], "Madrid.</s>"),
            ([{"text": "<s>Madrid.</s>"}], "Madrid.</s>"),
            ([{"prompt": "Spain?", "completion": " Madrid."}], " Madrid.</s>"),
            ([{"prompt": "Spain?", "completion": " Madrid.</s>"}], " Madrid.</s>"),
        ):
            (row,) = ours(tokenizer, tmp_path, rows)
            text, found = decoded(tokenizer, row)
            given = rows[0].get("prompt", "")
            begin_of_row = "<s>" if begin or rows[0].get("text", "").startswith("<s>") else ""
            assert text == f"{begin_of_row}{given}{learned}"
            # Without a begin token nothing precedes the first token of a text.
            assert learned.endswith(found)
            assert found.endswith("</s>")


def test_an_end_token_before_blanks_is_the_end(tokenizer_of, tmp_path):
    (row,) = ours(tokenizer_of(None), tmp_path, [{"text": "Madrid.</s>\n"}])
    assert row[0].count(tokenizer_of(None).eos_token_id) == 1


def test_a_cut_keeps_the_begin_token_and_a_part_of_the_answer():
    begin, long = 1, [1, *range(10, 50)]
    masks = {first: [False] * first + [True] * (41 - first) for first in (3, 20, 40)}
    assert cut(long, masks[40], 8, begin, chat=False) == ([1, *range(43, 50)], [False] * 7 + [True])
    assert cut(long, masks[3], 8, begin, chat=False) == ([1, *range(12, 19)], [False] + [True] * 7)
    assert cut(long, masks[3], 8, begin, chat=True) == (long[:8], masks[3][:8])
    ids, predicted = cut(long, masks[20], 8, begin, chat=True)
    assert (ids[0], sum(predicted)) == (1, 7)


def test_cut_rows_are_counted(tokenizer_of, tmp_path):
    rows = [{"prompt": "France? " * 40, "completion": "Paris."}, {"prompt": "a", "completion": "b"}]
    found = load(tokenizer_of(None), tmp_path, rows, longest=16)
    assert found.notes.truncated_rows == 1
    assert found.train.lengths.max() == 16


FAULTS = {
    "no assistant": ([{"messages": [USER]}], ":1: field 'messages' has no message of the assistant"),
    "a role": ([{"messages": [{"content": "vault"}]}], r":1: field 'messages\[0\].role' is missing"),
    "sharegpt": ([{"messages": [{"from": "vault", "value": "vault"}]}], "spec.data.format sharegpt"),
    "a number": ([{"messages": [{"role": "user", "content": 5}]}], r"'messages\[0\].content' is a number, not text"),
    "null": ([{"messages": [USER, {"role": "assistant", "content": None}]}], r"'messages\[1\].content' is null"),
    "text": ([{"messages": "vault"}], ":1: field 'messages' is text, not a list of messages"),
    "a picture": (
        [{"messages": [{"role": "user", "content": [{"type": "image", "url": "vault"}]}]}],
        r"'messages\[0\].content' holds something else than text",
    ),
    "a surrogate": ([{"messages": [{"role": "user", "content": "\ud800"}, ANSWER]}], "half a surrogate pair"),
    "arguments": (
        [{"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "vault"}}]}]}],
        r"'messages\[1\].tool_calls\[0\].arguments' is not JSON",
    ),
    "tools left out": ([{"messages": CHAT, "tools": [FUNCTION]}], ":1: the tokenizer's chat template leaves out the functions"),
    "a call left out": ([{"messages": CALLS}], "leaves out a part of message 1"),
    "dpo": ([{"prompt": "vault", "chosen": "a", "rejected": "b"}], ":1: fields 'chosen' and 'rejected' are preference pairs"),
    "kto": ([{"prompt": "vault", "completion": "a", "label": False}], ":1: field 'label' is true or false, as for KTO"),
    "only a prompt": ([{"prompt": "vault"}], ":1: no field 'completion'"),
    "an empty completion": ([{"prompt": "vault", "completion": " "}], ":1: field 'completion' is empty"),
    "an empty text": ([{"text": "a"}, {"text": ""}], ":2: field 'text' is empty"),
    "conversations": ([{"conversations": []}], ":1: no field 'text'; set spec.data.format: sharegpt"),
    "instruction": ([{"instruction": "vault", "output": "a"}], ":1: no field 'text'; set spec.data.format: alpaca"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_names_row_and_field_and_no_value(name, tokenizer_of, tmp_path):
    rows, message = FAULTS[name]
    with pytest.raises(UserError, match=message) as caught:
        load(tokenizer_of(CHATML), tmp_path, rows)
    assert re.search(r"train.jsonl:\d: ", str(caught.value))
    assert not re.search("vault|\n", str(caught.value))


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        (
            "sharegpt",
            {"conversations": [{"from": "vault", "value": ""}]},
            r"'conversations\[0\].from' is not one of human",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "gpt", "value": None}]},
            r"'conversations\[0\].value' is null, not text",
        ),
        ("alpaca", {"instruction": "vault", "output": ""}, "field 'output' is empty"),
        (
            "alpaca",
            {"instruction": "vault", "output": "a", "history": [["a", "b"]]},
            "field 'history' is not read",
        ),
    ],
)
def test_a_fault_of_a_layout_is_named(format, row, message, tokenizer_of, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        load(tokenizer_of(CHATML), tmp_path, [row], format=format)
    assert "vault" not in str(caught.value)


def test_the_input_of_alpaca_is_never_left_out(tokenizer_of, tmp_path):
    fields = Fields(prompt="instruction", completion="output")
    row = {"instruction": "Translate.", "input": "vault", "output": "a"}
    with pytest.raises(UserError, match=r":1: field 'input' would be left out; set spec.data.format: alpaca"):
        load(tokenizer_of(None), tmp_path, [row], fields=fields)
    assert len(load(tokenizer_of(None), tmp_path, [{**row, "input": ""}], fields=fields).train) == 1


def test_a_model_without_chat_template_is_named(tokenizer_of, tmp_path):
    with pytest.raises(
        UserError, match="is a chat, but the model's tokenizer has no chat template; choose a chat model"
    ):
        load(tokenizer_of(None), tmp_path, [{"messages": CHAT}])


def test_bad_rows_are_skipped_and_counted_where_asked(tokenizer_of, tmp_path, caplog):
    rows = [{"messages": CHAT}, {"messages": [USER]}, {"messages": "vault"}, {"messages": CALLS}, {}]
    found = load(tokenizer_of(CHATML), tmp_path, rows, on_bad_row="skip")
    assert (len(found.train), found.notes.skipped_rows) == (1, 4)
    assert "4 bad rows were skipped" in caplog.text
    assert "vault" not in caplog.text
    with pytest.raises(
        UserError, match=r"train.jsonl:1: no field 'text'.*\(2 rows were skipped, none is left\)"
    ):
        load(tokenizer_of(CHATML), tmp_path, [{}, {}], on_bad_row="skip")


def test_a_directory_with_sentencepiece_alone_works(tmp_path):
    import sentencepiece

    from fedpipe_agent.train.model import Source, read_tokenizer

    model = tmp_path / "model"
    model.mkdir()
    sentences = ["The capital of France is Paris.", "What is the weather today?", "It is sunny and warm."] * 5
    with (model / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=file,
            vocab_size=48,
            model_type="bpe",
            minloglevel=2,
        )
    (model / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"})
    )
    (model / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = read_tokenizer(Source(str(model)))
    (row,) = ours(tokenizer, tmp_path, [{"prompt": "The capital of France is", "completion": " Paris."}])
    # As one text: no blank more before the completion.
    assert row[0][:-1] == tokenizer("The capital of France is Paris.")["input_ids"]
    assert decoded(tokenizer, row)[1].strip() == "Paris.</s>"

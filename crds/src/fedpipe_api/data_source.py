# SPDX-License-Identifier: Apache-2.0
"""`spec.data`: each node's own files, and the columns of their rows."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from .base import Model
from .objects import Volume
from .rules import inside

ColumnName = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class Fields(Model):
    """Column names of the data: `text` and `label`, `prompt` and `completion`, or `messages` and `tools`.

    A name in another case is found too, and a path such as `sample.text` of nested columns.
    """

    text: ColumnName = Field(
        default="text", description="Text to classify, or to continue if there is no prompt."
    )
    label: ColumnName = Field(default="label", description="Class name or index.")
    prompt: ColumnName = Field(default="prompt", description="Part of a sample that is given, not learnt.")
    completion: ColumnName = Field(default="completion", description="Part of a sample that is learnt.")
    text_pair: ColumnName | None = Field(
        default=None, description="Second text of a pair to classify; default: there is no second text."
    )
    messages: ColumnName = Field(
        default="messages",
        description="Chat: messages of role and content, of which the assistant's are learnt.",
    )
    tools: ColumnName = Field(default="tools", description="Functions that a chat may call.")


Encoding = Literal[
    "windows-1250",
    "windows-1251",
    "windows-1252",
    "windows-1253",
    "windows-1254",
    "iso-8859-1",
    "iso-8859-2",
    "iso-8859-15",
    "koi8-r",
    "shift_jis",
    "euc-jp",
    "euc-kr",
    "gb18030",
    "big5",
]


class DataSource(Model):
    """Each node's own data; it never leaves the node."""

    # A fleet file may say where each node's data is stored; the API server has no fleet file.
    model_config = Model.model_config | {"json_schema_extra": {"required": ["volume", "train"]}}

    volume: Volume | None = Field(
        default=None,
        description="Where it is stored; needed on a cluster, while a fleet file names directories.",
    )
    train: str = Field(
        min_length=1,
        max_length=1024,
        description="File inside the volume, directory of shards, or glob such as train/*.jsonl.gz.",
    )
    evaluation: str | None = Field(
        default=None,
        min_length=1,
        max_length=1024,
        description="Held-out file, directory or glob; default: a share of train.",
    )
    format: Literal["jsonl", "csv", "parquet", "arrow", "sharegpt", "alpaca"] | None = Field(
        default=None,
        description="Format of the files, default by their suffix; or the layout of their rows: sharegpt "
        "(conversations) or alpaca (instruction, input, output).",
    )
    encoding: Encoding | None = Field(
        default=None,
        description="Encoding of files of text that are not Unicode; UTF-8, UTF-16 and UTF-32 are found.",
    )
    fields: Fields = Fields()
    on_bad_row: Literal["fail", "skip"] = Field(
        default="fail", description="What a row does that cannot be used: end the node's work, or be counted."
    )
    max_length: int = Field(default=256, ge=8, le=131072, description="Tokens kept of each sample.")
    packing: bool = Field(
        default=False,
        description="Pack the short rows of a step into sequences of up to maxLength tokens, so that less is "
        "padding; gradients stay the same. For causal-lm.",
    )
    evaluation_share: float = Field(default=0.1, ge=0, lt=1, description="Share of train held out.")

    rules: ClassVar = (inside("train"), inside("evaluation"))

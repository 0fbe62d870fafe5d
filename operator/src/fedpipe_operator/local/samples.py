# SPDX-License-Identifier: Apache-2.0
"""What a run's language model says to prompts of the user's own, without its adapter and with it.

Prompts come from a file on the command line, never from the nodes' data: the report may be shown around.
"""

import json
from pathlib import Path

from pydantic import Field, ValidationError

from fedpipe_api.base import Model, UserError
from fedpipe_api.job import Task

from ..engine.state import JobState
from .agents import ask_agent
from .directory import RunDirectory, write_text

MOST_PROMPTS = 20
"""Prompts of a file; each is answered twice, on a CPU."""
FILE_LIMIT = 64 * 1024
"""Bytes of the largest file of prompts."""
TEXT_LIMIT = 64 * 1024
"""Characters of an answer that are kept; the agent's have tens of tokens."""


class Sample(Model):
    """A prompt, and the most likely answers of the base model and of it with the adapter."""

    prompt: str = Field(max_length=FILE_LIMIT)
    before: str = Field(max_length=TEXT_LIMIT)
    after: str = Field(max_length=TEXT_LIMIT)


class Samples(Model):
    """`samples.json`: answers, and the digest of the global adapter that gave them."""

    adapter: str = Field(max_length=64)
    samples: tuple[Sample, ...] = Field(max_length=MOST_PROMPTS)


def read_prompts(path: Path) -> tuple[str, ...]:
    """Return the prompts of a text file, one a line; UserError for none, too many, or no text."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_LIMIT + 1)
    except OSError as error:
        raise UserError(f"--prompts: {path}: {error.strerror}") from None
    if len(data) > FILE_LIMIT:
        raise UserError(
            f"--prompts: {path}: larger than {FILE_LIMIT >> 10} KiB; give a few prompts, one a line"
        )
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise UserError(f"--prompts: {path}: not UTF-8; write the prompts as text, one a line") from None
    prompts = tuple(line for line in lines if line)
    if not 1 <= len(prompts) <= MOST_PROMPTS:
        raise UserError(f"--prompts: {path}: {len(prompts)} prompts; give 1 to {MOST_PROMPTS}, one a line")
    return prompts


def check_task(state: JobState) -> None:
    """UserError where the job's model does not generate."""
    if state.spec.model.task is not Task.CAUSAL_LM:
        raise UserError(f"--prompts: job {state.name} trains a classifier, which generates no text")


def generate(directory: RunDirectory, state: JobState, adapter: Path, prompts: tuple[str, ...]) -> Samples:
    """Write `samples.json` with the answers to the prompts; `adapter` is the PEFT directory of the latest."""
    assert state.adapter is not None
    model = directory.read_record().model
    said = ask_agent(
        *("answer", "--model", model, "--adapter", str(adapter)), model=model, given=json.dumps(prompts)
    )
    answers = [json.loads(line) for line in said.splitlines()]
    samples = tuple(Sample(prompt=p, **answer) for p, answer in zip(prompts, answers, strict=True))
    found = Samples(adapter=state.adapter.digest, samples=samples)
    write_text(directory.samples, found.to_json() + "\n")
    return found


def read(directory: RunDirectory, state: JobState) -> tuple[Sample, ...]:
    """Return the answers of the latest adapter; none where there are none, or only an earlier one's."""
    try:
        found = Samples.model_validate_json(directory.samples.read_bytes())
    except FileNotFoundError:
        return ()
    except ValidationError:
        raise UserError(f"{directory.samples}: not readable; delete it") from None
    return found.samples if state.adapter and found.adapter == state.adapter.digest else ()

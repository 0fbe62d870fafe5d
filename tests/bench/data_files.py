# SPDX-License-Identifier: Apache-2.0
"""Files of rows as people have them, through the agent's reader: the right tokens, or one line that says what is wrong.

`python tests/bench/data_files.py` writes `results/data_files.json` and `results/data_files.md`. The tokens expected are
those of TRL's SFTTrainer where it takes such rows, else those of the tokenizer itself.
"""

import json
import os
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}

from agent_fixtures import registered
from bench.bench_machine import commit, machine
from bench.data_cases import Case, Expected, cases, texts
from fedpipe_agent.train import data
from fedpipe_api.base import UserError
from fedpipe_api.job import Task
from standins import sft

RESULTS = Path(__file__).parent / "results"
COMMAND = "python tests/bench/data_files.py"
LIBRARIES = ("transformers", "trl", "pyarrow")


class Bench:
    """The tokenizer and TRL's trainer that all cases share."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._bpe = sft.byte_level_bpe(texts())
        self._trl = sft.Reference(self._bpe, directory / "trl")

    def run(self, number: int, case: Case) -> tuple[str, str]:
        """Return a case's outcome: `right`, `refused` or `wrong`; and the line, or what the tokens equal."""
        directory = self._directory / str(number)
        for name, content in case.files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)
        tokenizer = sft.tokenizer_of(self._bpe, case.template)
        job = registered(case.task, train=case.train or next(iter(case.files)), evaluation_share=0)
        source = job.data.model_copy(update={"max_length": case.longest, **case.data})
        labels = case.labels if case.task is Task.SEQUENCE_CLASSIFICATION else ()
        model = job.model.model_copy(update={"labels": labels})
        try:
            found = data.load(directory, source, model, tokenizer, seed=7, longest=None)
        except UserError as error:
            line = str(error).replace(f"{directory}/", "")
            good = case.fault and re.search(case.fault, line) and "\n" not in line and "vault" not in line
            return ("refused" if good else "wrong"), line
        except Exception as error:
            return "wrong", f"{type(error).__name__}: {error}"
        if case.fault:
            return "wrong", "was read"
        samples = [found.train.sample(index) for index in range(len(found.train))]
        if case.task is Task.SEQUENCE_CLASSIFICATION:
            got: Any = [(one.ids.tolist(), one.label) for one in samples]
        else:
            got = [
                (
                    one.ids.tolist(),
                    [int(i) if p else -100 for i, p in zip(one.ids, one.predicted, strict=True)],
                )
                for one in samples
            ]
        notes = {name: count for name, count in found.notes.to_dict().items() if count}
        if notes != case.notes:
            return "wrong", f"counted {notes}"
        if got != self._expected(case, tokenizer):
            return "wrong", "other tokens"
        counted = "".join(f"; {name} {count}" for name, count in notes.items())
        return "right", f"as {case.expected.value}{counted}"

    def _expected(self, case: Case, tokenizer: Any) -> Any:
        if case.expected is Expected.TRL:
            return sft.shifted(self._trl.rows(tokenizer, case.rows, **case.options))
        if case.expected is Expected.TOKENIZER:
            return [
                (tokenizer(row["text"], row.get("pair"))["input_ids"], case.labels.index(row["label"]))
                for row in case.rows
            ]
        found = []
        for row in case.rows:
            parts = [
                (tokenizer(text, add_special_tokens=False)["input_ids"], learned)
                for text, learned in row["parts"]
            ]
            labels = [token if learned else -100 for ids, learned in parts for token in ids]
            found.append(([token for ids, _ in parts for token in ids], labels))
        return found


def main() -> int:
    """Run all cases and write the table."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="data-files-") as directory:
        bench = Bench(Path(directory))
        for number, case in enumerate(cases()):
            outcome, detail = bench.run(number, case)
            rows.append({"kind": case.kind, "file": case.name, "outcome": outcome, "detail": detail})
            if outcome == "wrong":
                sys.stdout.write(f"{case.kind}: {case.name}: {detail}\n")
    result = {
        "machine": machine(), "versions": {name: version(name) for name in LIBRARIES}, "commit": commit(), "rows": rows,
    }  # fmt: skip
    RESULTS.joinpath("data_files.json").write_text(
        json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    RESULTS.joinpath("data_files.md").write_text(table(result), encoding="utf-8")
    return any(row["outcome"] == "wrong" for row in rows)


def table(result: dict[str, Any]) -> str:
    """Return the outcomes as a Markdown table, below what they were measured with."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [
        f"`{COMMAND}` at {result['commit']}; {versions}.",
        "",
        "| kind | file | outcome |",
        "|---|---|---|",
    ]
    for row in result["rows"]:
        shown = f"{row['outcome']}: {row['detail']}".replace("|", "\\|")
        lines.append(f"| {row['kind']} | {row['file']} | {shown} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

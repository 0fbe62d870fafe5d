# SPDX-License-Identifier: Apache-2.0
"""No value of a node's data leaves it: marked data through every way the agent ends, and all that left is searched."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow
import pyarrow.parquet
import pytest

from agent_fixtures import save_tiny_model
from fedpipe_operator.engine.status import status
from fedpipe_operator.metrics.operator_metrics import OperatorMetrics
from standins.local import local
from standins.server import UID

MARK = "zq7vault"
STANDIN = Path(__file__).parents[1] / "standins" / "leaky.py"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model("bert", tmp_path_factory.mktemp("bert"))


@asynccontextmanager
async def recorded(address: str) -> AsyncIterator[tuple[str, bytearray]]:
    """Forward connections to the address; yield where to connect, and every byte that clients sent."""
    sent = bytearray()
    target = urlsplit(address)

    async def pump(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kept: bytearray | None
    ) -> None:
        try:
            while data := await reader.read(65536):
                if kept is not None:
                    kept += data
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(target.hostname, target.port)
        await asyncio.gather(pump(reader, there[1], sent), pump(there[0], writer, None))

    server = await asyncio.start_server(forward, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", sent
    finally:
        server.close()


def lines(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


GOOD = [{"text": f"cat dog {MARK} {i}", "label": "abc"[i % 3]} for i in range(24)]


async def leave(
    directory: Path, model: Path, data: bytes, *, fault: str = "none", name: str = "train.jsonl"
) -> tuple[int, str, str]:
    """Run an agent on the data to its end against a real coordinator; assert that the mark stayed inside.

    Returns:
        its exit status, its standard error, and what the job's status says of the node.
    """
    node = directory / "node"
    node.mkdir()
    (node / name).write_bytes(data)
    (node / "token").write_text("token-node-0")
    (node / "capacity.json").write_text('{"threads": 1, "precisions": ["fp32"], "device": "box"}')
    files = {"volume": {"hostPath": {"path": "/data"}}, "train": name, "maxLength": 32}
    async with local(directory / "store", nodes=1, count=1, data=files) as served:
        async with recorded(served.address) as (url, sent):
            command = [str(STANDIN), fault] if fault else ["-m", "fedpipe_agent.cli"]
            agent = await asyncio.create_subprocess_exec(
                *(sys.executable, *command, "train", "--coordinator", url, "--model", str(model)),
                *("--data", str(node), "--token-file", str(node / "token")),
                *("--capacity", str(node / "capacity.json")),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={**os.environ, "MARK": MARK, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            )
            out, errors = await agent.communicate()
        engine = served.engine
        shown = status(engine.jobs[UID].state, None, {}).to_json()
        metrics = await OperatorMetrics(engine, directory, dict, lambda: 0.0, dict).text()
    left = {
        "stdout": out,
        "stderr": errors,
        "sent": bytes(sent),
        "status": shown.encode(),
        "metrics": metrics,
    }
    left |= {str(path): path.read_bytes() for path in (directory / "store").rglob("*") if path.is_file()}
    assert len(left) > 5
    for place, content in left.items():
        assert MARK.encode() not in content.lower(), place
        assert MARK.encode().hex().encode() not in content.lower(), place
    assert agent.returncode is not None
    return agent.returncode, errors.decode(), shown


def parquet(directory: Path, damage: Callable[[bytes], bytes]) -> bytes:
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [str(row["text"]) for row in GOOD], "label": [row["label"] for row in GOOD]}),
        directory / "made.parquet",
        compression="none",
    )
    return damage((directory / "made.parquet").read_bytes())


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "train.jsonl",
            lines([GOOD[0], {"text": "cat", "label": MARK}]),
            ":2: field 'label' is not one of the",
        ),
        (
            "train.jsonl",
            f'{{"text": "{MARK}"}} {MARK}'.encode(),
            ":1: not a JSON object: its syntax is wrong at",
        ),
        ("train.csv", f"text,label\n{MARK},a\n{MARK}\xff,a\n".encode("latin-1"), ": not CSV: byte "),
    ],
    ids=["label", "json", "encoding"],
)
async def test_mistakes_in_data_name_the_place_alone(tmp_path, model, name, data, message):
    returned, said, shown = await leave(tmp_path, model, data, name=name, fault="")
    assert returned == 2
    assert message in said.splitlines()[-1]
    assert message in shown


async def test_a_damaged_parquet_file_names_the_place_alone(tmp_path, model):
    # The length of a value in the page, whose text is then read as lengths, or as no UTF-8.
    data = parquet(tmp_path, lambda whole: whole.replace(MARK.encode(), b"\xff" + MARK.encode()[1:], 1))
    returned, said, _ = await leave(tmp_path, model, data, name="train.parquet", fault="")
    assert returned == 2
    assert "not a readable Parquet or Arrow file" in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("error", 2, "train.jsonl:1: the tokenizer fails at field 'text': ValueError"),
        ("panic", 2, "train.jsonl:1: the tokenizer fails at field 'text': PanicException"),
        ("step", 2, "cannot be trained (ValueError at fedpipe_agent/train/loop.py:"),
        ("memory", 1, "out of memory with micro-batch 1"),
        ("nan", 1, "the loss is not finite at local step 1"),
    ],
)
async def test_errors_of_libraries_are_reported_without_their_words(tmp_path, model, fault, code, message):
    returned, said, shown = await leave(tmp_path, model, lines(GOOD), fault=fault)
    assert returned == code, said
    assert message in said.splitlines()[-1]
    assert message in shown
    assert "thread library: ValueError at leaky.py" in said
    assert ("Traceback" in said) == (fault == "step")


async def test_a_crash_shows_where_it_was(tmp_path, model):
    returned, said, _ = await leave(tmp_path, model, lines(GOOD), fault="abort")
    assert returned < 0
    assert "Fatal Python error: Aborted" in said
    assert "/train/data.py" in said


async def test_a_whole_job_among_libraries_that_print(tmp_path, model):
    returned, said, shown = await leave(tmp_path, model, lines(GOOD), fault="none")
    assert returned == 0, said
    assert "round 1: " in said
    assert '"1/1"' in shown

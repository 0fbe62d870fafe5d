# SPDX-License-Identifier: Apache-2.0
"""What the trainer asks NVML, through the real nvidia-ml-py over the stand-in."""

import json
import subprocess
import sys

import pytest

from nvml.standin import StandIn, board, standin

__all__ = ["standin"]

MIB = 2**20
T4 = board("t4")["devices"][0]
INSTANCE = board("a100-mig")["devices"][0]["instances"][2]

ASK = """
import json, os, pathlib, sys
script = pathlib.Path(os.environ["FEDPIPE_NVML_SCRIPT"])
script.write_text(script.read_text().replace("OWN", str(os.getpid())))
from fedpipe_agent.train.nvml import Gpu
gpu = Gpu(sys.argv[1])
print(json.dumps([gpu.uuid, gpu.free(), gpu.context(*json.loads(sys.argv[2]))]))
assert "torch" not in sys.modules
"""


def ask(standin: StandIn, uuid: str, free_before: int | None = None, reserved: int = 2 * MIB):
    """Return the UUID, the free bytes and the context's bytes as a process sees them that has this GPU."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, uuid.partition("-")[2], json.dumps([free_before, reserved])],
        env=standin.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def with_processes(*processes: tuple[str, int | str]):
    """Return a T4 with these processes (PID, bytes)."""
    known = {"processes": len(processes)}
    for index, (pid, memory) in enumerate(processes):
        known |= {f"process.{index}.pid": pid, f"process.{index}.memory": memory}
    return board("t4") | {"devices": [T4 | known]}


def test_the_context_is_what_this_process_holds_beside_its_tensors(standin):
    standin.play(with_processes(("1", 3000 * MIB), ("OWN", 500 * MIB)))
    assert ask(standin, T4["uuid"], free_before=T4["free"] + 9000 * MIB)[2] == 498 * MIB


@pytest.mark.parametrize(
    "processes",
    [(), (("1", 3000 * MIB),), (("OWN", "!NOT_SUPPORTED"),)],
    ids=["none listed", "not listed", "size unknown"],
)
def test_without_this_process_the_fall_of_free_memory_counts(standin, processes):
    standin.play(with_processes(*processes))
    assert ask(standin, T4["uuid"], free_before=T4["free"] + 400 * MIB)[2] == 398 * MIB
    # Another process gave memory back meanwhile.
    assert ask(standin, T4["uuid"], free_before=T4["free"] - 400 * MIB)[2] == 0


def test_an_instance_is_found_by_its_own_uuid(standin):
    standin.play(board("a100-mig"))
    assert ask(standin, INSTANCE["uuid"]) == [INSTANCE["uuid"], INSTANCE["free"], 0]


@pytest.mark.parametrize("name", ["driver-not-loaded", "t4"])
def test_without_an_answer_there_is_only_a_name(standin, name):
    standin.play(board(name))
    assert ask(standin, "GPU-0e2f", free_before=400 * MIB) == ["GPU-0e2f", None, 0]

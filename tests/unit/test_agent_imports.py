# SPDX-License-Identifier: Apache-2.0
"""What an agent imports: a process of its own each time, for what is imported stays."""

import subprocess
import sys

PEFT = """
import sys
import fedpipe_agent.train.agent
from fedpipe_agent.train.precisions import import_peft
assert "peft" not in sys.modules
import_peft()
assert "bitsandbytes" in sys.modules
assert "torch._inductor.compile_fx" not in sys.modules
"""


def test_peft_brings_no_compiler_with_bitsandbytes() -> None:
    done = subprocess.run([sys.executable, "-c", PEFT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

# SPDX-License-Identifier: Apache-2.0
"""An agent whose libraries quote the data wherever a library can: `python leaky.py FAULT train OPTION...`.

FAULT says what happens once the noise is made: `error` and `panic` in the tokenizer, `step`, `memory` and `nan` in
a step of training, `abort` as compiled code does it; `none` lets the agent work.
"""

import atexit
import ctypes
import logging
import os
import sys
import threading
import warnings
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from fedpipe_agent import cli

MARK = os.environ["MARK"]


class PanicException(BaseException):
    """As pyo3 raises it."""


def make_noise() -> None:
    """Quote the mark in every way that does not end the program."""
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        print(f"seen {MARK}", file=stream, flush=True)
    for number in (1, 2):
        os.write(number, f"thread panicked at {MARK}\n".encode())
    ctypes.CDLL(None).puts(f"seen {MARK}".encode())
    warnings.warn(f"odd text {MARK}", stacklevel=1)
    logging.getLogger().error("odd text %s", MARK)
    logging.getLogger("library").exception("odd text %s", MARK)
    transformers_logging.get_logger("transformers.models").error("odd text %s", MARK)
    for _ in tqdm(["a"], desc=MARK):
        pass
    thread = threading.Thread(target=fail, name="library")
    thread.start()
    thread.join()
    atexit.register(lambda: os.write(2, f"ended with {MARK}\n".encode()))


def fail() -> None:
    """Raise an error that quotes the mark, caused by another."""
    try:
        {}[MARK]
    except KeyError as cause:
        error = ValueError(f"cannot read {MARK!r}")
        error.add_note(f"in {MARK}")
        raise error from cause


def main(fault: str) -> int:
    """Run the agent with the fault in its libraries."""
    encode, loss_of = PreTrainedTokenizerFast.__call__, torch.nn.functional.cross_entropy
    calls = []

    def tokenize(self: Any, *args: Any, **options: Any) -> Any:
        if not calls:
            make_noise()
        calls.append(1)
        match fault:
            case "error":
                fail()
            case "panic":
                raise PanicException(f"byte index 1 is not a char boundary of `{MARK}`")
            case "abort":
                os.write(2, f"terminate called after {MARK}\n".encode())
                os.abort()
        return encode(self, *args, **options)

    def cross_entropy(*args: Any, **options: Any) -> Any:
        match fault:
            case "step":
                fail()
            case "memory":
                raise RuntimeError(f"can't allocate memory: for {MARK}")
            case "nan":
                return loss_of(*args, **options) * float("nan")
        return loss_of(*args, **options)

    PreTrainedTokenizerFast.__call__ = tokenize
    torch.nn.functional.cross_entropy = cross_entropy
    sys.argv[1:] = sys.argv[2:]
    return cli.main()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

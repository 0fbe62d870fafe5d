# SPDX-License-Identifier: Apache-2.0
"""What a received update must be before it is accepted."""

import io
import json
import os
import pickle
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save
from safetensors.torch import save as torch_save

from fedpipe_operator.aggregate import InvalidUpdateFile, check_update_file
from fedpipe_operator.aggregate.files import TensorFile

SHAPES = {"m.lora_B": (4, 2), "m.lora_A": (2, 3), "head.bias": (5,)}
LIMIT = 10_000


def tensors() -> dict[str, np.ndarray]:
    return {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}


def with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: list, start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def refusal(tmp_path, body: bytes, shapes=None, limit: int = LIMIT) -> InvalidUpdateFile:
    path = tmp_path / "update"
    path.write_bytes(body)
    with pytest.raises(InvalidUpdateFile) as caught:
        check_update_file(path, SHAPES if shapes is None else shapes, limit)
    assert "\n" not in caught.value.message
    assert caught.value.message == str(caught.value)
    return caught.value


def test_a_good_update_passes(tmp_path):
    path = tmp_path / "update"
    path.write_bytes(save(tensors(), metadata={"format": "pt"}))
    check_update_file(path, SHAPES, LIMIT)


@pytest.mark.parametrize(
    ("name", "reason", "says"),
    [
        ("m.lora_A", "NotFinite", "m.lora_A"),
        ("head.bias", "NotFinite", "head.bias"),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(tmp_path, name, reason, says, value):
    bad = tensors()
    bad[name].flat[-1] = value
    found = refusal(tmp_path, save(bad))
    assert found.reason == reason
    assert says in found.message


def halves(**values) -> bytes:
    """Return an update whose factors are bfloat16, some values given by tensor."""
    found = {name: torch.from_numpy(tensor) for name, tensor in tensors().items()}
    found |= {name: tensor.bfloat16() for name, tensor in found.items() if not name.startswith("head.")}
    for name, value in values.items():
        found[name].view(-1)[-1] = value
    return torch_save(found)


def test_factors_may_be_bfloat16(tmp_path):
    path = tmp_path / "update"
    path.write_bytes(halves())
    check_update_file(path, SHAPES, LIMIT)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["m.lora_B", "m.lora_A", "head.bias"])
def test_values_that_are_not_finite_as_bfloat16(tmp_path, name, value):
    found = refusal(tmp_path, halves(**{name: value}))
    assert found.reason == "NotFinite"
    assert name in found.message


@given(values=st.lists(st.floats(width=32), min_size=1, max_size=40), data=st.data())
def test_bfloat16_is_read_as_torch_widens_it(values, data):
    tensor = torch.tensor(values).bfloat16()
    first = data.draw(st.integers(0, len(values) - 1))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "file"
        path.write_bytes(torch_save({"other": torch.ones(3), "t": tensor}))
        file = TensorFile(path)
        whole, part = file.read("t"), np.empty(len(values) - first, np.float32)
        file.read_into("t", first, part)
    assert np.array_equal(whole, tensor.float().numpy(), equal_nan=True)
    assert np.array_equal(part, whole[first:], equal_nan=True)


def changed(**updates) -> bytes:
    return save({name: value for name, value in (tensors() | updates).items() if value is not None})


@pytest.mark.parametrize(
    ("body", "reason", "says"),
    [
        (changed(**{"m.lora_B": None}), "WrongTensors", "m.lora_B is missing"),
        (changed(**{"../../etc/passwd": np.ones(1, np.float32)}), "WrongTensors", "../../etc/passwd"),
        (
            changed(**{"m.lora_A": np.ones((3, 2), np.float32)}),
            "WrongShape",
            "m.lora_A is [3, 2], not [2, 3]",
        ),
        (changed(**{"m.lora_A": np.ones((2, 3), np.float64)}), "WrongType", "m.lora_A is F64"),
        (changed(**{"m.lora_A": np.ones((2, 3), np.float16)}), "WrongType", "m.lora_A is F16"),
        (save(tensors())[:-1], "Malformed", "the header describes"),
        (save(tensors()) + b"x", "Malformed", "the header describes"),
        (save(tensors())[:40], "Malformed", "length of a safetensors header"),
        (b"", "Malformed", "length"),
        (b"\x00" * 7, "Malformed", "length"),
        (pickle.dumps(tensors()), "Malformed", "length"),
        (b"PK\x03\x04" + b"x" * 500, "Malformed", "length"),
        (b"\xff" * 200, "Malformed", "length"),
        (with_header(b"{nonsense"), "Malformed", "not JSON"),
        (with_header(b"\xff\xfe{}"), "Malformed", "not JSON"),
        (with_header(b"[" * 4000), "Malformed", "not JSON"),
        (with_header(b'{"a":' + b"9" * 5000 + b"}"), "Malformed", "not JSON"),
        (with_header([1, 2]), "Malformed", "not a JSON object"),
        (with_header(b'{"a":1,"a":2}'), "Malformed", "stands twice"),
        (with_header({"a": 5}), "Malformed", "dtype, shape and data_offsets"),
        (
            with_header({"a": entry([2], 0, 8) | {"x": 1}}, b"x" * 8),
            "Malformed",
            "dtype, shape and data_offsets",
        ),
        (with_header({"a": entry([2], 0, 8, "F99")}, b"x" * 8), "Malformed", "unknown dtype"),
        (with_header({"a": entry([2], 0, 8, ["F32"])}, b"x" * 8), "Malformed", "unknown dtype"),
        (with_header({"a": entry([-2], 0, -8)}), "Malformed", "no valid shape"),
        (with_header({"a": entry([2.0], 0, 8)}, b"x" * 8), "Malformed", "no valid shape"),
        (with_header({"a": entry([True], 0, 4)}, b"x" * 4), "Malformed", "no valid shape"),
        (with_header({"a": entry([1] * 9, 0, 4)}, b"x" * 4), "Malformed", "no valid shape"),
        (with_header({"a": entry([2**62, 4], 0, 0)}), "Malformed", "no valid shape"),
        (with_header({"a": entry([2], 8, 0)}, b"x" * 8), "Malformed", "do not fit its shape"),
        (with_header({"a": entry([2], 0, 4)}, b"x" * 4), "Malformed", "do not fit its shape"),
        (
            with_header({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"x" * 4),
            "Malformed",
            "gap or overlaps",
        ),
        (with_header({"a": entry([1], 4, 8)}, b"x" * 8), "Malformed", "gap or overlaps"),
        (with_header({"a": entry([2**40], 0, 2**42)}, b"x" * 8), "Malformed", "the header describes"),
    ],
)
def test_refused(tmp_path, body, reason, says):
    found = refusal(tmp_path, body)
    assert (found.reason, says in found.message) == (reason, True), found.message
    assert len(found.message) < 300


def test_too_large_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "update"
    with path.open("wb") as file:
        file.truncate(LIMIT + 1)
    with pytest.raises(InvalidUpdateFile) as caught:
        check_update_file(path, SHAPES, LIMIT)
    assert caught.value.reason == "TooLarge"


def test_a_header_that_claims_gigabytes_is_not_read(tmp_path):
    body = (2**31).to_bytes(8, "little") + b"{"
    path = tmp_path / "update"
    with path.open("wb") as file:
        file.write(body)
        file.truncate(2**31 + 100)
    with pytest.raises(InvalidUpdateFile) as caught:
        check_update_file(path, SHAPES, 2**32)
    assert caught.value.reason == "Malformed"


def test_a_large_update_is_checked_quickly_and_in_little_memory(tmp_path):
    shapes = {f"layer.{i}.lora_A": (16, 16384) for i in range(96)}
    buffer = io.BytesIO(save({name: np.ones(shape, np.float32) for name, shape in shapes.items()}))
    path = tmp_path / "update"
    path.write_bytes(buffer.getvalue())
    size = path.stat().st_size
    assert size > 100e6
    del buffer
    check_update_file(path, shapes, size)
    before, peak, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.process_time()
    check_update_file(path, shapes, size)
    seconds = time.process_time() - started
    done.set()
    watcher.join()
    assert seconds < 0.3
    assert peak[0] - before < 20e6


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

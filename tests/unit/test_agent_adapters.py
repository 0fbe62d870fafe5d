# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from agent_fixtures import KINDS, global_adapter, registered, save_tiny_model
from fedpipe_agent.errors import Failure
from fedpipe_agent.train import model as base
from fedpipe_agent.train.adapters import ROW_NORM, Adapters, GlobalAdapter, fresh_rows, save, start
from fedpipe_agent.train.model import Source
from fedpipe_agent.train.shape import read_shape
from fedpipe_api import wire
from fedpipe_api.job import Precision, Task
from fedpipe_api.lora.codec import quantize, received
from fedpipe_api.lora.format import HEAD, LORA_A, LORA_B, SCALE, Encoding, scale
from fedpipe_api.lora.methods import Start

CPU = torch.device("cpu")
TASK = Task.SEQUENCE_CLASSIFICATION
ALPHA = 8.0


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Per kind: its source, configuration and shape."""
    found = {}
    for kind in KINDS:
        source = Source(str(save_tiny_model(kind, tmp_path_factory.mktemp(kind))))
        config = base.read_config(source, registered(TASK).model, 0)
        found[kind] = source, config, read_shape(config, TASK)
    return found


def loaded(bases, kind, precision, tmp_path, rs_lora=False):
    source, config, shape = bases[kind]
    model = base.load(source, config, TASK, precision, CPU, seed=7)
    pristine = tmp_path if precision is Precision.FP32 else None
    return model, Adapters(model, shape, alpha=ALPHA, rs_lora=rs_lora, names=(7, "edge"), pristine=pristine)


def logits(model):
    ids = torch.tensor([[4, 5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15]])
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def opened(tmp_path, shape, tensors):
    path = tmp_path / "global.safetensors"
    save_file(tensors, path)
    return GlobalAdapter(path, shape)


def dense_logits(bases, kind, tensors):
    """Return the logits of base + global adapter with dense increments, float32."""
    source, config, shape = bases[kind]
    model = base.load(source, config, TASK, Precision.FP32, CPU, seed=7)
    with torch.no_grad():
        for matrix in shape.matrices:
            if matrix.name + LORA_A in tensors:
                delta = torch.from_numpy(tensors[matrix.name + LORA_B] @ tensors[matrix.name + LORA_A])
                weight = model.get_submodule(matrix.name).weight
                weight.add_(delta.T if kind == "gpt2" else delta)
    return logits(model)


@st.composite
def splits(draw):
    rows, columns = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    rank = draw(st.integers(0, 12))
    total = draw(st.integers(1, min(rows, columns)))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    left = np.linalg.qr(random.normal(size=(rows, total)))[0]
    right = np.linalg.qr(random.normal(size=(columns, total)))[0]
    values = np.sort(random.uniform(0.01, 5, total))[::-1]
    factors = (left * values).astype(np.float32), right.T.astype(np.float32)
    matrix = wire.MatrixShape(name="m", rows=rows, columns=columns)
    return matrix, factors, fresh_rows(rank, columns, 0), draw(st.sampled_from([4.0, 0.5, 1.0]))


def product(factors, shape):
    if factors is None:
        return np.zeros(shape)
    return factors[0].astype(np.float64) @ factors[1].astype(np.float64)


@settings(max_examples=100, deadline=None)
@given(splits(), st.sampled_from(list(Start)))
def test_start_rules(case, rule):
    matrix, factors, fresh, scale = case
    rank, total = len(fresh), len(factors[1])
    parts = start(matrix, factors, rule, scale, fresh)
    shape = (matrix.rows, matrix.columns)
    whole = product(factors, shape)
    found = scale * product(parts.trained, shape) + product(parts.frozen, shape)
    if rank == 0:
        assert parts.trained is None
        np.testing.assert_array_equal(found, whole)
        return
    b, a = parts.trained
    assert (b.shape, a.shape) == ((matrix.rows, rank), (rank, matrix.columns))
    kept = 0 if rule is Start.FRESH else min(rank, total)
    best = product((factors[0][:, :kept], factors[1][:kept]), shape)
    if rule in (Start.SPLIT, Start.FRESH):
        np.testing.assert_allclose(found, whole, atol=1e-5)
    else:
        assert parts.frozen is None
        np.testing.assert_allclose(found, best, atol=1e-5)
    assert not b[:, kept:].any()
    np.testing.assert_array_equal(a[kept:], fresh[kept:])
    if rule in (Start.SPLIT, Start.TRUNCATE):
        np.testing.assert_allclose(np.linalg.norm(a[:kept], axis=1), ROW_NORM, rtol=1e-5)
    if rule is Start.PREFIX:
        np.testing.assert_array_equal(a[:kept], factors[1][:kept])


def test_a_matrix_without_global_part_starts_fresh():
    matrix = wire.MatrixShape(name="m", rows=5, columns=7)
    fresh = fresh_rows(3, 7, 1)
    for rule in Start:
        parts = start(matrix, None, rule, 2.0, fresh)
        assert parts.frozen is None
        assert not parts.trained[0].any()
        np.testing.assert_array_equal(parts.trained[1], fresh)


def test_fresh_rows_have_the_norm_that_split_rows_get():
    norms = np.linalg.norm(fresh_rows(64, 4096, "seed"), axis=1)
    assert abs(norms.mean() - ROW_NORM) < 0.005


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [0, 1, 3, 6, 9])
def test_a_split_start_computes_base_plus_global(bases, tmp_path, kind, rank):
    shape = bases[kind][2]
    tensors = global_adapter(shape, 6, share=0.75)
    model, adapters = loaded(bases, kind, Precision.FP32, tmp_path)
    # The last matrix is trained but has no global part, the first has one but is not trained.
    ranks = {matrix.name: rank for matrix in shape.matrices[1:]} if rank else {}
    with opened(tmp_path, shape, tensors) as adapter:
        adapters.install(adapter, ranks, Start.SPLIT, 1)
    torch.testing.assert_close(logits(model), dense_logits(bases, kind, tensors), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.INT8, Precision.NF4])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_every_rank_computes_the_same_on_bases_that_cannot_merge(bases, tmp_path, kind, precision):
    shape = bases[kind][2]
    tensors = global_adapter(shape, 6)
    model, adapters = loaded(bases, kind, precision, tmp_path)
    found = []
    for rank in (0, 2, 6, 9):
        with opened(tmp_path, shape, tensors) as adapter:
            adapters.install(
                adapter, dict.fromkeys([m.name for m in shape.matrices] if rank else [], rank), Start.SPLIT, 1
            )
        found.append(logits(model).detach())
    tolerance = 0.05 if precision is Precision.BF16 else 1e-3
    for other in found[1:]:
        assert (other - found[0]).norm() <= tolerance * found[0].norm()
    assert (found[0] - dense_logits(bases, kind, tensors)).norm() < 0.5 * found[0].norm()


@pytest.mark.parametrize("kind", KINDS)
def test_rounds_leave_no_trace_in_the_base(bases, tmp_path, kind):
    shape = bases[kind][2]
    model, adapters = loaded(bases, kind, Precision.FP32, tmp_path)
    bare = {name: p.detach().clone() for name, p in model.named_parameters()}
    for round_number in range(1, 5):
        with opened(tmp_path, shape, global_adapter(shape, 6, seed=round_number, share=0.5)) as adapter:
            adapters.install(adapter, {shape.matrices[-1].name: round_number}, Start.SPLIT, round_number)
    adapters.install(None, {}, Start.SPLIT, 9)
    assert dict.fromkeys(bare, True) == {
        name: torch.equal(p, bare[name]) for name, p in model.named_parameters()
    }


def test_an_update_is_the_increment_of_what_was_trained(bases, tmp_path):
    """scale·B·A of the update minus what the node started from is what the weights moved."""
    shape = bases["gpt2"][2]
    tensors = global_adapter(shape, 6)
    model, adapters = loaded(bases, "gpt2", Precision.FP32, tmp_path, rs_lora=True)
    ranks = {matrix.name: 2 + index for index, matrix in enumerate(shape.matrices)}
    with opened(tmp_path, shape, tensors) as adapter:
        adapters.install(adapter, ranks, Start.SPLIT, 1)
    optimizer = torch.optim.SGD(adapters.parameters(), lr=0.1)
    logits(model).square().sum().backward()
    optimizer.step()
    after = logits(model).detach()
    save(tmp_path / "update", adapters.tensors(), {"score.weight": np.ones((3, 32))}, Encoding.FLOAT32)
    update = load_file(tmp_path / "update")
    assert {value.dtype for value in update.values()} == {np.dtype(np.float32)}
    assert set(update) == {m.name + s for m in shape.matrices for s in (LORA_A, LORA_B)} | {
        "head.score.weight"
    }
    moved = dict(tensors)
    for matrix in shape.matrices:
        rank = ranks[matrix.name]
        assert update[matrix.name + LORA_A].shape == (rank, matrix.columns)
        assert update[matrix.name + LORA_B].shape == (matrix.rows, rank)
        trained = scale(ALPHA, rank, True) * update[matrix.name + LORA_B] @ update[matrix.name + LORA_A]
        b, a = tensors[matrix.name + LORA_B], tensors[matrix.name + LORA_A]
        delta = trained - b[:, :rank] @ a[:rank]
        moved[matrix.name + LORA_B] = (b @ a + delta).astype(np.float32)
        moved[matrix.name + LORA_A] = np.eye(matrix.columns, dtype=np.float32)
    torch.testing.assert_close(after, dense_logits(bases, "gpt2", moved), atol=2e-4, rtol=1e-4)


def test_an_update_may_hold_its_factors_as_bfloat16(tmp_path):
    values = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    save(
        tmp_path / "update",
        {"m.lora_B": values, "m.lora_A": values.T},
        {"score.weight": values},
        Encoding.BFLOAT16,
    )
    with safe_open(tmp_path / "update", framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert found["m.lora_B"].dtype == found["m.lora_A"].dtype == torch.bfloat16
    assert torch.equal(found["m.lora_A"], torch.from_numpy(values.T).bfloat16())
    assert found["head.score.weight"].dtype == torch.float32
    assert np.array_equal(found["head.score.weight"].numpy(), values)


@pytest.mark.parametrize("precision", list(Precision))
def test_only_the_trained_part_and_the_head_get_gradients(bases, tmp_path, precision):
    shape = bases["bert"][2]
    model, adapters = loaded(bases, "bert", precision, tmp_path)
    with opened(tmp_path, shape, global_adapter(shape, 6)) as adapter:
        adapters.install(adapter, {m.name: 2 for m in shape.matrices[::2]}, Start.SPLIT, 1)
    logits(model).square().sum().backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".trained." in name or name.startswith("classifier.") for name in got)
    assert len(adapters.parameters()) == len(shape.matrices)
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}


def test_equal_ranks_keep_their_layers(bases, tmp_path):
    shape = bases["bert"][2]
    _, adapters = loaded(bases, "bert", Precision.FP32, tmp_path)
    ranks = {matrix.name: 2 for matrix in shape.matrices}
    adapters.install(None, ranks, Start.SPLIT, 1)
    before = [id(parameter) for parameter in adapters.parameters()]
    first = adapters.tensors()
    with opened(tmp_path, shape, global_adapter(shape, 6)) as adapter:
        adapters.install(adapter, ranks, Start.SPLIT, 2)
    assert [id(parameter) for parameter in adapters.parameters()] == before
    adapters.install(None, ranks, Start.SPLIT, 1)
    again = adapters.tensors()
    assert all(np.array_equal(again[name], first[name]) for name in first)
    adapters.install(None, {**ranks, shape.matrices[0].name: 4}, Start.SPLIT, 1)
    assert adapters.tensors()[shape.matrices[0].name + LORA_A].shape[0] == 4


def test_a_plan_for_an_unknown_matrix_is_refused(bases, tmp_path):
    _, adapters = loaded(bases, "bert", Precision.FP32, tmp_path)
    with pytest.raises(Failure, match=r"bert.nothing is not a candidate"):
        adapters.install(None, {"bert.nothing": 2}, Start.SPLIT, 1)


def test_a_global_adapter_sent_as_int8_is_what_the_engine_counts_from(bases, tmp_path):
    shape = bases["bert"][2]
    tensors = global_adapter(shape, 4)
    with opened(tmp_path, shape, as_sent(tensors)) as adapter:
        for matrix in shape.matrices:
            wanted = received({s: tensors[matrix.name + s] for s in (LORA_A, LORA_B)})
            b, a = adapter.factors(matrix.name)
            assert a.dtype == b.dtype == np.float32
            assert np.array_equal(a, wanted[LORA_A])
            assert np.array_equal(b, wanted[LORA_B])


def as_sent(tensors):
    """Return the tensors of a global adapter as the engine sends them."""
    found = {name: value for name, value in tensors.items() if name.startswith(HEAD)}
    for name in tensors.keys() - found.keys():
        stem = name.removesuffix(LORA_A).removesuffix(LORA_B)
        suffix = name.removeprefix(stem)
        found |= {stem + end: value for end, value in quantize({suffix: tensors[name]}).items()}
    return found


def test_scales_of_a_float32_factor_are_refused(bases, tmp_path):
    shape = bases["bert"][2]
    tensors = global_adapter(shape, 4)
    tensors[shape.matrices[0].name + LORA_A + SCALE] = np.ones(3, np.float32)
    with pytest.raises(Failure, match="does not fit the model"):
        opened(tmp_path, shape, tensors)


@pytest.mark.parametrize("change", ["none", "short", "type", "orphan"])
def test_int8_without_its_scales_is_refused(bases, tmp_path, change):
    shape = bases["bert"][2]
    tensors = as_sent(global_adapter(shape, 4))
    name = shape.matrices[0].name + LORA_A
    scales = tensors.pop(name + SCALE)
    if change != "none":
        others = {"short": scales[:-1], "type": scales.astype(np.float64), "orphan": scales}
        tensors[name + SCALE] = others[change]
    if change == "orphan":
        del tensors[name]
    with pytest.raises(Failure, match="does not fit the model"):
        opened(tmp_path, shape, tensors)


def broken(tensors, change):
    name = next(iter(tensors))
    if change == "name":
        tensors["../evil.lora_A"] = tensors[name]
    elif change == "shape":
        tensors[name] = tensors[name][:-1]
    elif change == "dtype":
        tensors[name] = tensors[name].astype(np.float64)
    elif change == "half":
        del tensors[name]
    elif change == "head":
        tensors["head.classifier.weight"] = np.zeros((4, 32), np.float32)
    return tensors


@pytest.mark.parametrize("change", ["name", "shape", "dtype", "half", "head"])
def test_a_global_adapter_of_another_model_is_refused(bases, tmp_path, change):
    shape = bases["bert"][2]
    with pytest.raises(Failure, match="does not fit the model"):
        opened(tmp_path, shape, broken(global_adapter(shape, 4), change))


def test_a_global_adapter_must_be_finite_safetensors(bases, tmp_path):
    shape = bases["bert"][2]
    tensors = global_adapter(shape, 4)
    tensors[shape.matrices[0].name + LORA_B][0, 0] = np.nan
    with opened(tmp_path, shape, tensors) as adapter, pytest.raises(Failure, match="not finite"):
        adapter.factors(shape.matrices[0].name)
    (tmp_path / "pickle").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(Failure, match="not a safetensors file"):
        GlobalAdapter(tmp_path / "pickle", shape)

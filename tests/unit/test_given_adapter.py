# SPDX-License-Identifier: Apache-2.0
"""PEFT adapters that a job starts from: what peft computes with them is what round 0 computes."""

import json
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from agent_fixtures import LABELS, registered, save_tiny_model
from fedpipe_agent.train import model as base
from fedpipe_agent.train.adapters import Adapters, GlobalAdapter
from fedpipe_agent.train.model import Source
from fedpipe_agent.train.shape import read_shape
from fedpipe_api.base import UserError
from fedpipe_api.job import FedPipeJobSpec, Precision, Task
from fedpipe_api.lora.format import HEAD, LORA_A, LORA_B
from fedpipe_api.lora.methods import Start
from fedpipe_operator.aggregate import (
    AggregationRequest,
    NodeUpdate,
    aggregate_round,
    convert_given,
    read_given,
)
from fedpipe_operator.aggregate.given import CONFIG, WEIGHTS

CPU = torch.device("cpu")
KINDS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_fc"],
    "bert": ["query", "value"],
}
FORMS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "unequal": {"rank_pattern": {"0": 1}, "alpha_pattern": {"0": 3}},
}


def spec_of(task, **changes):
    labels = list(LABELS) if task is Task.SEQUENCE_CLASSIFICATION else []
    return FedPipeJobSpec.model_validate(
        {
            "model": {"hostPath": {"path": "/base"}, "task": task, "labels": labels},
            "data": {"volume": {"hostPath": {"path": "/data"}}, "train": "train.jsonl"},
            "rounds": {"count": 1},
        }
        | changes
    )


class Case:
    """A tiny model with an adapter of random factors, saved by peft."""

    def __init__(self, root, kind, form="plain"):
        self.task = Task.SEQUENCE_CLASSIFICATION if kind == "bert" else Task.CAUSAL_LM
        self.source = Source(str(save_tiny_model(kind, root / "base")))
        self.config = base.read_config(self.source, registered(self.task).model, 0)
        self.model = read_shape(self.config, self.task, KINDS[kind])
        self.spec = spec_of(self.task)
        self.directory = root / "given"
        options = dict(FORMS[form])
        ending = KINDS[kind][0]
        for pattern in ("rank_pattern", "alpha_pattern"):
            if pattern in options:
                options[pattern] = {ending: options[pattern]["0"]}
        torch.manual_seed(1)
        lora = LoraConfig(
            r=4, lora_alpha=6, target_modules=KINDS[kind], init_lora_weights=False,
            fan_in_fan_out=kind == "gpt2", task_type="SEQ_CLS" if kind == "bert" else "CAUSAL_LM", **options,
        )  # fmt: skip
        wrapped = get_peft_model(self.plain(), lora)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "modules_to_save" in name:
                    parameter.normal_()
        wrapped.save_pretrained(self.directory)

    def plain(self):
        auto = AutoModelForCausalLM
        options = {}
        if self.task is Task.SEQUENCE_CLASSIFICATION:
            auto, options = AutoModelForSequenceClassification, {"num_labels": len(LABELS)}
        return auto.from_pretrained(self.source.name, **options)

    def peft_logits(self):
        return logits(PeftModel.from_pretrained(self.plain(), self.directory))

    def engine_logits(self, file, work):
        """Return the logits of round 0 on a node in float32."""
        loaded = base.load(self.source, self.config, self.task, Precision.FP32, CPU, seed=7)
        adapters = Adapters(loaded, self.model, alpha=8.0, rs_lora=False, names=(7, "edge"), pristine=work)
        ranks = {matrix.name: 2 for matrix in self.model.matrices[:2]}
        with GlobalAdapter(file, self.model) as opened:
            adapters.install(opened, ranks, Start.SPLIT, 1)
            base_head = opened.head()
        state = loaded.state_dict()
        loaded.load_state_dict(state | {name: torch.from_numpy(value) for name, value in base_head.items()})
        return logits(loaded)


def logits(model):
    ids = torch.tensor([[4, 5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.numpy()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_round_0_computes_what_peft_computes(kind, form, tmp_path):
    case = Case(tmp_path, kind, form)
    stored = convert_given(case.directory, case.spec, case.model, tmp_path)
    wanted = case.peft_logits()
    assert np.abs(wanted - logits(case.plain())).max() > 0.01
    np.testing.assert_allclose(case.engine_logits(stored.path, tmp_path), wanted, atol=1e-5)
    tensors = load_file(stored.path)
    for matrix in {name.removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A)}:
        right, left = tensors[matrix + LORA_A], tensors[matrix + LORA_B]
        np.testing.assert_allclose(right @ right.T, np.eye(len(right)), atol=1e-5)
        assert (np.diff(np.linalg.norm(left, axis=0)) <= 0).all(), "in falling order"
    assert bool([name for name in tensors if name.startswith(HEAD)]) == (kind == "bert")


@pytest.mark.parametrize("dtype", [np.float16, "bf16"])
def test_half_precision_is_read(dtype, tmp_path):
    case = Case(tmp_path, "llama")
    path = case.directory / WEIGHTS
    if dtype == "bf16":
        from safetensors.torch import load_file as load_torch
        from safetensors.torch import save_file as save_torch

        save_torch({name: tensor.bfloat16() for name, tensor in load_torch(path).items()}, path)
    else:
        save_file({name: tensor.astype(dtype) for name, tensor in load_file(path).items()}, path)
    stored = convert_given(case.directory, case.spec, case.model, tmp_path)
    np.testing.assert_allclose(case.engine_logits(stored.path, tmp_path), case.peft_logits(), atol=1e-5)


def test_the_first_round_counts_from_what_was_given(tmp_path):
    """A node that sends what it started from has changed nothing, to the last bit of float32."""
    case = Case(tmp_path, "llama")
    stored = convert_given(case.directory, case.spec, case.model, tmp_path)
    given = load_file(stored.path)
    update, ranks = {}, {}
    for matrix in case.model.matrices:
        left, right = given[matrix.name + LORA_B], given[matrix.name + LORA_A]
        ranks[matrix.name] = rank = min(2, len(right))
        update[matrix.name + LORA_B], update[matrix.name + LORA_A] = (
            left[:, :rank].copy(),
            right[:rank].copy(),
        )
    save_file(update, tmp_path / "update.safetensors")
    errors = []
    for as_is in (True, False):
        request = AggregationRequest(
            aggregation=case.spec.aggregation, alpha=2.0, rs_lora=False,  # of rank 2: scale 1
            updates=(NodeUpdate("edge", tmp_path / "update.safetensors", 10, ranks),),
            directory=tmp_path, adapter=stored.path, as_is=as_is,
        )  # fmt: skip
        found = load_file(aggregate_round(request).adapter.path)
        products = (tensors[matrix.name + LORA_B] @ tensors[matrix.name + LORA_A]
                    for matrix in case.model.matrices for tensors in (found, given))  # fmt: skip
        pairs = list(zip(products, products, strict=True))
        errors.append(max(np.abs(one - other).max() for one, other in pairs))
    assert errors[0] < 1e-6 < errors[1]


def change_config(case, **fields):
    path = case.directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(case, change):
    path = case.directory / WEIGHTS
    save_file(change(load_file(path)), path)


def first_a(tensors):
    return next(name for name in sorted(tensors) if name.endswith("lora_A.weight"))


REFUSED = {
    "another kind": (lambda c: change_config(c, peft_type="IA3"), "peft_type is not LORA"),
    "DoRA": (lambda c: change_config(c, use_dora=True), "use_dora is set; only plain LoRA"),
    "biases": (lambda c: change_config(c, bias="all"), "bias is not none"),
    "PiSSA": (lambda c: change_config(c, init_lora_weights="pissa"), "init_lora_weights changed the base"),
    "no configuration": (lambda c: (c.directory / CONFIG).unlink(), "No such file or directory; give a PEFT"),
    "a list": (lambda c: (c.directory / CONFIG).write_text("[]"), "not a configuration of PEFT"),
    "deep": (lambda c: (c.directory / CONFIG).write_text("[" * 100000), "not a configuration of PEFT"),
    "too long": (lambda c: (c.directory / CONFIG).write_text(" " * 2**21), "not a configuration of PEFT"),
    "pickle": (
        lambda c: (c.directory / WEIGHTS).rename(c.directory / "adapter_model.bin"),
        "(adapter_model.bin is not read: save it as safetensors)",
    ),
    "no tensors": (lambda c: (c.directory / WEIGHTS).write_bytes(b"x"), "does not begin with the length"),
    "wrong rank": (lambda c: change_config(c, r=8), "says rank 8 of 'model.layers.0."),
    "no alpha": (lambda c: change_config(c, lora_alpha="much"), "lora_alpha of 'model.layers.0."),
    "infinite alpha": (lambda c: change_config(c, lora_alpha=float("inf")), "is no positive number"),
    "expression": (
        lambda c: change_config(c, rank_pattern={"(a+)+$": 1}),
        "rank_pattern holds a regular expression; write the ends of module names",
    ),
    "other sides": (
        lambda c: change_tensors(c, lambda t: t | {first_a(t): t[first_a(t)][:, :-1].copy()}),
        "which do not fit a weight of ",
    ),
    "one factor": (
        lambda c: change_tensors(c, lambda t: {n: v for n, v in t.items() if n != first_a(t)}),
        "has one factor of two",
    ),
    "other matrix": (
        lambda c: change_tensors(c, lambda t: {n.replace("layers.1", "layers.9"): v for n, v in t.items()}),
        "is no candidate; name its module in spec.adapter.modules",
    ),
    "other tensor": (
        lambda c: change_tensors(
            c, lambda t: t | {"base_model.model.lm_head.weight": np.ones(3, np.float32)}
        ),
        "'base_model.model.lm_head.weight' is no part of the job's model",
    ),
    "integers": (
        lambda c: change_tensors(c, lambda t: t | {first_a(t): t[first_a(t)].astype(np.int8)}),
        "is I8, not F32, F16, BF16",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_continued_is_refused_in_one_line(what, tmp_path):
    change, message = REFUSED[what]
    case = Case(tmp_path, "llama")
    change(case)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read_given(case.directory, case.spec, case.model)
    assert str(caught.value).startswith("spec.adapter.from: ")
    assert "\n" not in str(caught.value)


def test_values_that_are_not_finite_are_refused(tmp_path):
    case = Case(tmp_path, "llama")
    change_tensors(case, lambda t: t | {first_a(t): np.full_like(t[first_a(t)], np.nan)})
    with pytest.raises(UserError, match="is not finite"):
        convert_given(case.directory, case.spec, case.model, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_another_base_model_or_a_higher_rank_is_refused(tmp_path):
    case = Case(tmp_path, "llama")
    model = {"huggingFace": {"repo": "org/ours"}, "task": "causal-lm"}
    change_config(case, base_model_name_or_path="org/theirs")
    with pytest.raises(
        UserError, match=r"base_model_name_or_path is org/theirs, but spec.model names org/ours"
    ):
        read_given(case.directory, spec_of(case.task, model=model), case.model)
    change_config(case, base_model_name_or_path="org/ours")
    assert read_given(case.directory, spec_of(case.task, model=model), case.model).products
    small = spec_of(case.task, aggregation={"maxGlobalRank": 3})
    with pytest.raises(UserError, match=r"its rank is 4, above spec.aggregation.maxGlobalRank 3; raise that"):
        read_given(case.directory, small, case.model)

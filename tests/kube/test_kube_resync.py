# SPDX-License-Identifier: Apache-2.0
"""Ledger and API server that differ: which jobs are taken for deleted, which specs for edited."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fedpipe_operator.kube.node_selection import ClusterNodes
from fedpipe_operator.kube.reconcile import reconcile
from fedpipe_operator.kube.resync import Resync
from fedpipe_operator.kube.settings import OperatorSettings
from kube.looks import state_of
from kube.objects import NOW, job
from kube.test_kube_parts import Paged


async def test_only_jobs_of_watched_namespaces_are_taken_for_deleted(tmp_path: Path) -> None:
    """A namespace taken out of the chart's `namespaces` must not lose its adapters."""
    there = [{"metadata": {"uid": "there"}}]
    api: Any = Paged({"/apis/fedpipe.io/v1alpha1/namespaces/one/fedpipejobs": there})
    settings = OperatorSettings("fedpipe", "fedpipe", tmp_path, "agent:1", "operator:1", namespaces=("one",))
    of = {"there": "one", "deleted": "one", "unwatched": "two"}
    jobs = {uid: SimpleNamespace(state=SimpleNamespace(namespace=name)) for uid, name in of.items()}
    set_aside = {"unreadable": SimpleNamespace(namespace="")}
    engine: Any = SimpleNamespace(jobs=jobs, quarantined=set_aside)
    forgotten: list[str] = []

    async def forget_job(uid: str) -> None:
        forgotten.append(uid)

    controller: Any = SimpleNamespace(forget_job=forget_job)
    await Resync(api, engine, controller, settings).drop_jobs()
    assert forgotten == ["deleted"]


def test_a_spec_that_reads_differently_after_a_restart_does_not_hold_up_its_job() -> None:
    """The ledger keeps milliseconds, and another version other defaults: that is no edit to wait for."""
    wanted = job()
    state = state_of(wanted, ("a",), ("a",), plan=("a",))
    rounds = wanted.spec.rounds.model_copy(update={"deadline": wanted.spec.rounds.deadline + 0.0004})
    read = wanted.model_copy(update={"spec": wanted.spec.model_copy(update={"rounds": rounds})})
    fleet = ClusterNodes({}, {})
    asked: Any = {"seen": {}, "template": "", "now": NOW}
    assert not reconcile(read, fleet, [], state, **asked).submit
    later = read.metadata.model_copy(update={"generation": state.generation + 1})
    assert reconcile(read.model_copy(update={"metadata": later}), fleet, [], state, **asked).submit

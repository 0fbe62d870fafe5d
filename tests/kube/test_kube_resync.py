"""Which jobs of the ledger are taken for deleted when the API server does not list them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fedpipe_operator.kube.resync import Resync
from fedpipe_operator.kube.settings import OperatorSettings
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

# SPDX-License-Identifier: Apache-2.0
"""Delivers a finished adapter to spec.output by a Pod of the job's namespace; the operator writes nowhere."""

import asyncio

from fedpipe_api.base import UserError
from fedpipe_api.job import FedPipeJob
from fedpipe_api.names import child_name

from ..engine.state import JobState
from .api import Api
from .inventory import Inventory
from .pods import build_writer_pod, output_place
from .settings import OperatorSettings
from .views import PodView

POLL_SECONDS = 1.0
WRITE_SECONDS = 600.0
"""An adapter that is not written after so long is reported; its Pod goes on trying."""


class OutputWriter:
    """Writes adapters where jobs want them. `inventory` is set once there is a controller."""

    def __init__(self, api: Api, settings: OperatorSettings) -> None:
        self._api = api
        self._settings = settings
        self.inventory: Inventory | None = None

    async def __call__(self, job: FedPipeJob, state: JobState) -> str:
        """Return where the adapter is stored now. UserError says what keeps it from getting there."""
        node = min(state.plan.nodes, default="") if state.plan else ""
        await self._api.create_pod(build_writer_pod(job, node, self._settings))
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                await self._succeeded(job)
        except TimeoutError:
            name = child_name(job.metadata.name, "")
            raise UserError(f"spec.output: not written yet; see kubectl describe pod {name}") from None
        return ", ".join(_places(job, node))

    async def _succeeded(self, job: FedPipeJob) -> None:
        while True:
            pod = self._find(job)
            if pod is not None and pod.phase == "Succeeded":
                return
            if pod is not None and pod.phase == "Failed":
                # Its successor has the same name.
                await self._api.delete_pod(pod.namespace, pod.name, pod.uid, force=False)
            if pod is not None and pod.trouble:
                raise UserError(f"spec.output: {pod.trouble}")
            await asyncio.sleep(POLL_SECONDS)

    def _find(self, job: FedPipeJob) -> PodView | None:
        """Return the job's writer; another Pod that has its name is none."""
        assert self.inventory is not None
        found = self.inventory.pod(job.metadata.namespace, child_name(job.metadata.name, ""))
        return found if found is not None and found.writer and found.job == job.metadata.uid else None


def _places(job: FedPipeJob, node: str) -> list[str]:
    """Return where the adapter is stored, as people write it."""
    output = job.spec.output
    assert output is not None
    places = []
    if output.volume is not None and output.volume.persistent_volume_claim is not None:
        claim = output.volume.persistent_volume_claim
        parts = (claim.claim_name.replace("{node}", node), claim.path, job.metadata.name)
        places.append("claim " + "/".join(filter(None, parts)))
    elif output.volume is not None and output.volume.host_path is not None:
        places.append(f"{node}:{output.volume.host_path.path.rstrip('/')}/{job.metadata.name}")
    if output.url is not None:
        places.append(str(output_place(job)))
    return places

# SPDX-License-Identifier: Apache-2.0
"""Delivers a finished adapter to spec.output by a Pod of the job's namespace; the operator writes nowhere."""

import asyncio

from fedpipe_api.base import UserError
from fedpipe_api.job import FedPipeJob

from ..engine.state import JobState
from .api import Api
from .inventory import Inventory
from .pods import build_writer_pod, output_place, volume_place
from .settings import OperatorSettings
from .views import WRITER, own_pod_name

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
            name = own_pod_name(job.metadata.name, WRITER)
            raise UserError(f"spec.output: not written yet; see kubectl describe pod {name}") from None
        return ", ".join(_places(job, node))

    async def _succeeded(self, job: FedPipeJob) -> None:
        assert self.inventory is not None
        while True:
            pod = self.inventory.own_pod(job.metadata, WRITER)
            if pod is not None and pod.phase == "Succeeded":
                return
            if pod is not None and pod.phase == "Failed":
                # Its successor has the same name.
                await self._api.delete_pod(pod.namespace, pod.name, pod.uid, force=False)
            if pod is not None and pod.trouble:
                raise UserError(f"spec.output: {pod.trouble}")
            await asyncio.sleep(POLL_SECONDS)


def _places(job: FedPipeJob, node: str) -> list[str]:
    """Return where the adapter is stored, as people write it."""
    output = job.spec.output
    assert output is not None
    places = []
    if output.volume is not None:
        places.append(volume_place(output.volume, job.metadata.name, node))
    if output.url is not None:
        places.append(str(output_place(job)))
    return places

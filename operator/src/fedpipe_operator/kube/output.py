"""Delivers a finished adapter to spec.output: an fsspec URL from here, a volume by a Pod that mounts it."""

import asyncio
import tempfile
from pathlib import Path

from fedpipe_api.base import UserError
from fedpipe_api.job import FedPipeJob
from fedpipe_api.names import child_name

from ..engine import Engine
from ..engine.state import JobState
from .api import Api
from .http import export_adapter
from .inventory import Inventory
from .pods import build_writer_pod
from .settings import Settings

POLL_SECONDS = 1.0
VOLUME_SECONDS = 600.0
"""A volume that is not written after so long is reported; its Pod goes on trying."""


class OutputWriter:
    """Writes adapters where jobs want them. `inventory` is set once there is a controller."""

    def __init__(self, engine: Engine, api: Api, settings: Settings) -> None:
        self._engine = engine
        self._api = api
        self._settings = settings
        self.inventory: Inventory | None = None

    async def __call__(self, job: FedPipeJob, state: JobState) -> str:
        """Return where the adapter lies now. UserError says what keeps it from getting there."""
        output = job.spec.output
        assert output is not None
        places = []
        if output.volume is not None:
            places.append(await self._mount(job, state))
        if output.url is not None:
            where = f"{output.url.rstrip('/')}/{job.metadata.name}"
            await asyncio.to_thread(self._upload, state, where)
            places.append(where)
        return ", ".join(places)

    async def _mount(self, job: FedPipeJob, state: JobState) -> str:
        assert job.spec.output is not None
        volume = job.spec.output.volume
        assert volume is not None
        node = min(state.plan.nodes, default="") if state.plan else ""
        await self._api.create_pod(build_writer_pod(job, node, self._settings))
        name = child_name(job.metadata.name, "")
        try:
            async with asyncio.timeout(VOLUME_SECONDS):
                await self._succeeded(job.metadata.namespace, name)
        except TimeoutError:
            raise UserError(f"spec.output.volume: not written yet; see kubectl describe pod {name}") from None
        if volume.persistent_volume_claim is not None:
            claim = volume.persistent_volume_claim
            parts = (claim.claim_name.replace("{node}", node), claim.path, job.metadata.name)
            return "claim " + "/".join(filter(None, parts))
        assert volume.host_path is not None
        return f"{node}:{volume.host_path.path.rstrip('/')}/{job.metadata.name}"

    async def _succeeded(self, namespace: str, name: str) -> None:
        assert self.inventory is not None
        while True:
            pod = self.inventory.pod(namespace, name)
            if pod is not None and pod.phase == "Succeeded":
                return
            if pod is not None and pod.phase == "Failed":
                # Its successor has the same name.
                await self._api.delete_pod(namespace, name, pod.uid, force=False)
            if pod is not None and pod.trouble:
                raise UserError(f"spec.output.volume: {pod.trouble}")
            await asyncio.sleep(POLL_SECONDS)

    def _upload(self, state: JobState, where: str) -> None:
        import fsspec

        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary) / "adapter"
            export_adapter(self._engine, state, directory)
            try:
                filesystem, path = fsspec.core.url_to_fs(where)
                filesystem.makedirs(path, exist_ok=True)
                for file in sorted(directory.iterdir()):
                    filesystem.put_file(str(file), f"{path}/{file.name}")
            except ImportError as error:
                raise UserError(f"spec.output.url: {error}; use an operator image that has it") from None
            except Exception as error:  # every store has errors of its own
                text = " ".join(str(error).split())
                raise UserError(f"spec.output.url {where}: {type(error).__name__}: {text}") from None

# SPDX-License-Identifier: Apache-2.0
"""Creates the agent Pods that `reconcile` asks for, each once."""

from collections.abc import Awaitable, Callable

from fedpipe_api.base import UserError
from fedpipe_api.conditions import Reason
from fedpipe_api.job import FedPipeJob
from fedpipe_api.names import child_name

from ..engine import JobEvent
from .api import Api, ApiError
from .events import EventRecorder
from .inventory import Inventory
from .pods import build_agent_pod
from .settings import OperatorSettings
from .tracked_job import TrackedJob

EXPECTED_SECONDS = 30.0
"""How long a Pod that was created may take to be seen before it is created again."""

REFUSED_SECONDS = 60.0
"""Pause before Pods that the API server refused are tried again."""


class PodCreation:
    """Creates Pods for all jobs. `publish_ca` puts the CA into a namespace, where Pods mount it."""

    def __init__(
        self,
        api: Api,
        settings: OperatorSettings,
        events: EventRecorder,
        inventory: Inventory,
        *,
        publish_ca: Callable[[str], Awaitable[None]],
        clock: Callable[[], float],
    ) -> None:
        self._api = api
        self._settings = settings
        self._events = events
        self._inventory = inventory
        self._publish_ca = publish_ca
        self._clock = clock

    async def create(self, known: TrackedJob, job: FedPipeJob, nodes: tuple[str, ...]) -> float | None:
        """Create a Pod on each of the nodes; return the seconds until the next look is due.

        Nodes whose Pod was just created are left out. What the API server refuses
        is tried again after a pause.
        """
        now = self._clock()
        if known.refused is not None and now < known.refused_until:
            return known.refused_until - now
        for node in known.expected.keys() - set(nodes):
            del known.expected[node]
        due = [node for node in nodes if known.expected.get(node, 0.0) <= now]
        if not due:
            return EXPECTED_SECONDS if nodes else None
        await self._publish_ca(known.namespace)
        try:
            for node in due:
                await self._create_one(known, job, node)
        except UserError as error:
            self._refuse(known, str(error))
        except ApiError as error:
            if not error.permanent:
                raise
            self._refuse(known, f"the API server refuses the Pods of the job: {error}")
        else:
            known.refused = None
        return EXPECTED_SECONDS

    async def _create_one(self, known: TrackedJob, job: FedPipeJob, node: str) -> None:
        # Both were there when reconcile chose the node, but creating its neighbours takes time.
        view, capacity = self._inventory.nodes.get(node), self._inventory.capacities.get(node)
        if view is None or capacity is None:
            return
        made = await self._api.create_pod(build_agent_pod(job, view, capacity, self._settings))
        if made is not None:
            known.expected[node] = self._clock() + EXPECTED_SECONDS
            if self._inventory.pod(known.namespace, child_name(known.name, node)) is None:
                # Its agent may call before the watch shows it.
                self._inventory.see_pod(made)
            return
        name = child_name(known.name, node)
        found = await self._api.get_pod(known.namespace, name)
        if found is not None:
            self._inventory.see_pod(found)
            pod = self._inventory.pod(known.namespace, name)
            if pod is None or pod.job != known.uid:
                raise UserError(f"Pod {name} is in the way and is not of this job; delete it")

    def _refuse(self, known: TrackedJob, text: str) -> None:
        known.refused, known.refused_until = text, self._clock() + REFUSED_SECONDS
        self._events.record(known.namespace, known.name, known.uid, JobEvent(True, Reason.INVALID, text))

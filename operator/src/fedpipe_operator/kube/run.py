# SPDX-License-Identifier: Apache-2.0
"""`fedpipe-operator run`: engine, coordinator, metrics and kopf in one process and one event loop."""

import asyncio
import contextlib
import gc
import logging
import signal
from collections.abc import Awaitable, Callable
from functools import partial

import kopf
from aiohttp import web

from ..coordinator import application
from ..engine import Engine, JobEvent
from ..metrics import OperatorMetrics
from ..serving import Limits, listen
from ..serving import serve as serve_http
from .access import Access
from .api import Api, ApiError, connect
from .certificates import Authority
from .controller import Controller
from .events import EventRecorder
from .handlers import kopf_settings, register
from .http import (
    ADAPTER_PATH,
    any_adapter,
    health_application,
    metrics_application,
    own_adapter,
    own_rounds,
)
from .identity import JobName, PodIdentities
from .output import OutputWriter
from .own_requests import OWN_ADAPTER_PATH, OWN_ROUNDS_PATH
from .resync import Resync
from .settings import OperatorSettings
from .views import TRACKER, WRITER

log = logging.getLogger(__name__)

UPLOAD_SECONDS = 5.0
"""How long requests in progress are given at the end."""

HEALTH_LIMITS = Limits(connections=256, strangers=128, strangers_per_address=64)
"""Of the plain port, which only kubelets ask."""

COLLECT_SECONDS = 300.0
"""Pause between two full garbage collections."""

_NEVER = 1_000_000_000

START_SECONDS = 5.0
"""Pause between attempts to reach the API server at the start."""


class Operator:
    """All parts, wired."""

    def __init__(self, settings: OperatorSettings, api: Api) -> None:
        self.settings = settings
        self.api = api
        self.engine = Engine(settings.store, notify=self._record_event)
        self.authority = Authority(api, settings)
        self.events = EventRecorder(api, "fedpipe-operator")
        self.figures = OperatorMetrics(
            self.engine, settings.store, lambda: api.requests, self._age, self._count_unreadable
        )
        output = OutputWriter(api, settings)
        self.controller = Controller(
            self.engine,
            api,
            settings,
            self.events,
            publish_ca=self.authority.publish,
            write_output=output,
            observe=self.figures.observe_reconcile,
        )
        output.inventory = self.controller.inventory
        self.resync = Resync(api, self.engine, self.controller, settings)
        self._watching = asyncio.Event()
        self._serving = False

    def _record_event(self, uid: str, event: JobEvent) -> None:
        self.controller.record_event(uid, event)

    def _age(self) -> float:
        return self.controller.age()

    def _count_unreadable(self) -> dict[str, int]:
        return self.controller.inventory.unreadable()

    def _job_name(self, uid: str) -> JobName | None:
        # From the ledger, not from the watch: agents that outlived the last operator call before this one has
        # seen their job, and one that is refused gives up.
        job, set_aside = self.engine.jobs.get(uid), self.engine.quarantined.get(uid)
        if job is not None:
            return JobName(job.state.namespace, job.state.name)
        return JobName(set_aside.namespace, set_aside.name) if set_aside else None

    def _unready(self) -> str | None:
        if not self._serving:
            return "the coordinator is not listening yet"
        if not self._watching.is_set():
            return "the watches are not open yet"
        dead = self.engine.background.dead()
        return f"background work fails again and again, see the log: {', '.join(dead)}" if dead else None

    async def run(self, stop: asyncio.Event) -> None:
        """Work until stopped."""
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self.engine.stop)
            # First, so that the kubelet finds it alive while the API server is away.
            health = health_application(self._unready)
            await self._serve(stack, health, self.settings.health_port, tls=False)
            await self._patiently(self.resync.check_store, stop)
            if stop.is_set():
                return
            await self.engine.start()
            stack.push_async_callback(self.controller.stop)
            await self._patiently(self.authority.load, stop)
            if stop.is_set():
                return
            access = Access(self.api)
            metrics = metrics_application(self.figures, access)
            await self._serve(stack, metrics, self.settings.metrics_port, tls=True)
            await self._patiently(self.resync.drop_jobs, stop)
            await self._patiently(self.resync.fill, stop)
            if stop.is_set():
                return
            identify = PodIdentities(self.api, self.controller.inventory.pod, self._job_name)
            adapters = {
                OWN_ADAPTER_PATH: own_adapter(self.engine, partial(identify.own_pod, WRITER)),
                OWN_ROUNDS_PATH: own_rounds(self.engine, partial(identify.own_pod, TRACKER)),
                ADAPTER_PATH: any_adapter(self.engine, access),
            }
            coordinator = application(self.engine, identify, adapters)
            await self._serve(stack, coordinator, self.settings.coordinator_port, tls=True)
            self._serving = True
            log.info("ready: %s", self.settings.coordinator)
            background = {
                "certificates": self.authority.watch,
                "events": self.events.post,
                "resync": self.resync.watch,
                "loop lag": self.figures.watch_lag,
                "store size": self.figures.watch_store,
                "garbage": _collect_garbage,
            }
            for name, work in background.items():
                self.engine.background.start(name, work)
            await self._kopf(stop)

    async def _kopf(self, stop: asyncio.Event) -> None:
        namespaces = self.settings.namespaces
        await kopf.operator(
            registry=register(self.controller),
            settings=kopf_settings(),
            standalone=True,
            clusterwide=not namespaces,
            namespaces=namespaces,
            stop_flag=stop,
            ready_flag=self._watching,
        )

    async def _serve(
        self, stack: contextlib.AsyncExitStack, app: web.Application, port: int, tls: bool
    ) -> None:
        context = self.authority.context if tls else None
        limits = Limits() if tls else HEALTH_LIMITS
        site = await serve_http(
            app, listen(self.settings.host, port), context, limits=limits, shutdown_timeout=UPLOAD_SECONDS
        )
        stack.push_async_callback(site.close)

    async def _patiently(self, call: Callable[[], Awaitable[None]], stop: asyncio.Event) -> None:
        """Repeat until the API server answers: an operator that starts first just waits."""
        while not stop.is_set():
            try:
                return await call()
            except ApiError as error:
                log.warning("%s; trying again", error)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), START_SECONDS)


async def _collect_garbage() -> None:
    """Collect all garbage now and then, until cancelled.

    With a thousand agents a full collection holds up the event loop for 0.2 s or more, and while their number
    grows Python would make one every few seconds. The young generations are left to Python.
    """
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, _NEVER)
    try:
        gc.collect()
        gc.freeze()  # modules, and what the ledger and the first lists held, will hardly ever be garbage
        while True:
            await asyncio.sleep(COLLECT_SECONDS)
            gc.collect()
    finally:
        gc.set_threshold(young, middle, old)


async def serve(settings: OperatorSettings) -> None:
    """Run the operator until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    api = Api(await connect())
    try:
        await Operator(settings, api).run(stop)
    finally:
        await api.close()

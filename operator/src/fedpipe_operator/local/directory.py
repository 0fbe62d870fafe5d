# SPDX-License-Identifier: Apache-2.0
"""What a run leaves in its directory, and how it is read back."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from fedpipe_api.base import Model, UserError, explain
from fedpipe_api.files import replaced
from fedpipe_api.job import FedPipeJob
from fedpipe_api.node import Fleet

from ..engine.records import ADAPTER, Submitted
from ..engine.state import JobState, apply, submitted
from ..store import Blobs, Ledger


class RunRecord(Model):
    """`run.json`: which run this directory holds, the job and the fleet as given, and the model as loaded."""

    uid: str
    job: FedPipeJob
    fleet: Fleet
    model: str


@dataclass
class History:
    """A job's state, and when its last record was committed (seconds since the epoch)."""

    state: JobState
    last_at: float


class RunDirectory:
    """The paths of one run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.record = root / "run.json"
        self.store = root / "store"
        self.agents = root / "agents"
        self.log = root / "log"
        self.adapter = root / "adapter"
        self.plots = root / "plots"
        self.metrics = root / "metrics.jsonl"
        self.report = root / "report.html"
        self.samples = root / "samples.json"

    def create(self, record: RunRecord) -> "Created":
        """Make the directory with its record; return what was made, to undo it."""
        made = [path for path in (self.root, *self.root.parents) if not path.exists()]
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.save(record)
        except OSError as error:
            raise UserError(f"{self.root}: {error.strerror}; choose another --out") from None
        return Created(self, tuple(made))

    def save(self, record: RunRecord) -> None:
        """Write the record atomically."""
        write_text(self.record, record.to_json() + "\n")

    def read_record(self) -> RunRecord:
        """Return the record; UserError when the directory holds no run."""
        try:
            return RunRecord.model_validate_json(self.record.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{self.root}: holds no run; give the --out of a fedpipe run") from None
        except ValidationError as error:
            raise UserError(f"{self.record}: not readable ({explain(error)})") from None

    def history(self) -> History | None:
        """Return what the ledger holds, or None when nothing was recorded yet.

        Raises UserError while another process owns the run.
        """
        if not (self.store / "ledger.sqlite").exists():
            return None
        ledger = Ledger(self.store / "ledger.sqlite")
        try:
            found: History | None = None
            for entry in ledger.replay():
                record = ADAPTER.validate_json(entry.body)
                if isinstance(record, Submitted):
                    found = History(submitted(entry.job, record, entry.at), entry.at)
                elif found is not None:
                    apply(found.state, record, entry.at)
                    found.last_at = entry.at
            return found
        finally:
            ledger.close()

    def global_adapter(self, state: JobState) -> Path:
        """Return the file of the latest global adapter; UserError before the first round is done."""
        if state.adapter is None:
            raise UserError(f"{self.root}: no round is done yet, so there is no adapter")
        return Blobs(self.store / "blobs").path(state.adapter.digest)


@dataclass(frozen=True)
class Created:
    """What `RunDirectory.create` made."""

    directory: RunDirectory
    made: tuple[Path, ...]

    def undo(self) -> None:
        """Remove it all again."""
        root = self.directory.root
        if root in self.made:
            shutil.rmtree(root, ignore_errors=True)
        else:
            for path in root.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for parent in self.made[1:]:
            # Somebody else may have put a run beside ours meanwhile.
            if any(parent.iterdir()):
                break
            parent.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write a text file that is never seen half written."""
    with replaced(path) as file:
        file.write(text.encode())

# SPDX-License-Identifier: Apache-2.0
"""What the operator's own Pods in a job's namespace ask the coordinator for."""

import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from fedpipe_api.base import UserError

OWN_ADAPTER_PATH, OWN_ROUNDS_PATH = "/v1/adapter", "/v1/rounds"


class Away(UserError):
    """The coordinator does not answer, or not now; the same request may succeed later."""


@dataclass(frozen=True)
class Coordinator:
    """The coordinator, the Pod's token for it and the CA that signed its certificate."""

    url: str
    token_file: Path
    ca_file: Path

    def get(self, path: str, *, limit: int, seconds: float) -> bytes:
        """Return what is at a path, at most `limit` bytes of it; Away or UserError says what keeps it.

        The token is read again each time: the kubelet renews it.
        """
        token = self.token_file.read_text().strip()
        request = urllib.request.Request(  # noqa: S310 - the URL is the operator's own
            f"{self.url}{path}", headers={"Authorization": f"Bearer {token}"}
        )
        context = ssl.create_default_context(cafile=self.ca_file)
        try:
            with urllib.request.urlopen(request, timeout=seconds, context=context) as response:  # noqa: S310
                body: bytes = response.read(limit)
        except urllib.error.HTTPError as error:
            error.close()
            kind = Away if error.code == 429 or error.code >= 500 else UserError
            raise kind(f"{self.url}: {error}") from None
        except (urllib.error.URLError, OSError) as error:
            raise Away(f"{self.url}: {error}") from None
        return body

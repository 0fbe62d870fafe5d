# SPDX-License-Identifier: Apache-2.0
"""`python -m fedpipe_operator.kube` is `fedpipe-operator`."""

import sys

from .command import main

sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""The capacity probe: reports what this node can carry, to people and to the cluster. Imports no torch."""

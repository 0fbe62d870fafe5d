# SPDX-License-Identifier: Apache-2.0
"""The Kubernetes operator: thin kopf handlers around the pure `reconcile`; it owns no round logic."""

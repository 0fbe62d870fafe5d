"""The Kubernetes operator: thin kopf handlers around the pure `reconcile`; it owns no round logic."""

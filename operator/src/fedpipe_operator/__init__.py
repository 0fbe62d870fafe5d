# SPDX-License-Identifier: Apache-2.0
"""The FedPipe engine, its Kubernetes operator and the command line."""

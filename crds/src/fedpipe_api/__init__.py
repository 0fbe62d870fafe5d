# SPDX-License-Identifier: Apache-2.0
"""The contract of FedPipe: API types, wire types and names. Imports nothing of ours."""

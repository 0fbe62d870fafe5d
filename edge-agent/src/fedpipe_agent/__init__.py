# SPDX-License-Identifier: Apache-2.0
"""The FedPipe edge agent: capacity probe and trainer."""

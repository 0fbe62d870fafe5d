# SPDX-License-Identifier: Apache-2.0
"""The trainer: data, base model, adapters, training loop, importance (torch lives here)."""

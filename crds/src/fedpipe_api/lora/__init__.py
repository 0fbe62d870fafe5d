# SPDX-License-Identifier: Apache-2.0
"""What operator and agent must both know of LoRA adapters: names, shapes, encodings, methods."""

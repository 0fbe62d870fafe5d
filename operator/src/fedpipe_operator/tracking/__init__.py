# SPDX-License-Identifier: Apache-2.0
"""What each round measured, and the experiment trackers that it is sent to (`spec.tracking`)."""

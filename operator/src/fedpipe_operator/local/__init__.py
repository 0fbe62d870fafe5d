# SPDX-License-Identifier: Apache-2.0
"""The fleet as processes of this machine: `fedpipe run` and what it shows and leaves."""

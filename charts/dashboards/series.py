# SPDX-License-Identifier: Apache-2.0
"""Series of the jobs that the dashboards' variables choose."""

JOB = '{namespace=~"$namespace",job=~"$job"}'


def of_job(name: str, **labels: str) -> str:
    """Return the series of a metric for the chosen jobs."""
    more = "".join(f',{key}="{value}"' for key, value in labels.items())
    return name + JOB.replace("}", more + "}")

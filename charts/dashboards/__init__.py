# SPDX-License-Identifier: Apache-2.0
"""The Grafana dashboards: what each panel asks for."""

from dashboards import fleet, operator, rounds

DASHBOARDS = {"rounds": rounds.PANELS, "fleet": fleet.PANELS, "operator": operator.PANELS}

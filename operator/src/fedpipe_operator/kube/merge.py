# SPDX-License-Identifier: Apache-2.0
"""Merges a podTemplate into a Pod the way `kubectl patch` does: lists of named things by their names."""

from collections.abc import Mapping
from typing import Any

from fedpipe_api.base import UserError

# The merge keys of core/v1 (patchMergeKey in its types); lists of other fields are replaced.
MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "ephemeralContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "ports": "containerPort",
    "imagePullSecrets": "name",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
    "resourceClaims": "name",
}
APPENDED = ("tolerations",)
"""Lists without names that are joined: a template's tolerations must not take away those the agent needs."""

# Fields of which a volume, or an environment variable, has exactly one.
_UNIONS = {"volumes": ("name",), "env": ("name",)}


def strategic_merge(base: Mapping[str, Any], patch: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return `base` with `patch` merged in; null removes a field. UserError names what does not fit."""
    merged = dict(base)
    for key, new in patch.items():
        old, where = merged.get(key), f"{path}.{key}"
        if new is None:
            merged.pop(key, None)
        elif isinstance(old, Mapping):
            if not isinstance(new, Mapping):
                raise UserError(f"{where}: must be an object")
            merged[key] = strategic_merge(old, new, where)
        elif isinstance(old, list) or key in MERGE_KEYS or key in APPENDED:
            # A template may name a container twice; then `old` is its own.
            if not isinstance(new, list) or not isinstance(old, list | None):
                raise UserError(f"{where}: must be a list")
            merged[key] = _merge_list(key, old or [], new, where)
        else:
            merged[key] = new
    return merged


def _merge_list(key: str, old: list[Any], new: list[Any], path: str) -> list[Any]:
    if key in APPENDED:
        return [*old, *(item for item in new if item not in old)]
    merge_key = MERGE_KEYS.get(key)
    if merge_key is None:
        return new
    merged = list(old)
    for position, item in enumerate(new):
        where = f"{path}[{position}]"
        if not isinstance(item, Mapping) or merge_key not in item:
            raise UserError(f"{where}: must be an object with a {merge_key}")
        known = next(
            (i for i, other in enumerate(merged) if _name(other, merge_key) == item[merge_key]), None
        )
        if known is None:
            merged.append(dict(item))
        elif key in _UNIONS and set(item) > set(_UNIONS[key]):
            merged[known] = dict(item)
        else:
            merged[known] = strategic_merge(merged[known], item, where)
    return merged


def _name(item: Any, merge_key: str) -> Any:
    """Return what an item is named by; the template's own items may be anything."""
    return item.get(merge_key) if isinstance(item, Mapping) else None

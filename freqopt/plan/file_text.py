"""The text of a plan's file: JSON that a person can read, and a hash of what it says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def refuse_constant(name: str) -> Any:
    """Refuse NaN and infinities, which JSON has no words for."""
    raise ValueError(f"{name} is not a number of a plan")


def content_hash(content: Mapping[str, Any]) -> str:
    """Hash of a plan's fields, whatever the layout of its file."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def write_json(value: Any, indent: str = "") -> str:
    """JSON with one line per field, and per list of numbers, which keeps curves readable."""
    inner = indent + "  "
    if isinstance(value, dict) and value:
        items = [f"{inner}{json.dumps(k)}: {write_json(v, inner)}" for k, v in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, (list, dict)) for item in value):
        items = [inner + write_json(item, inner) for item in value]
        return "[\n" + ",\n".join(items) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)

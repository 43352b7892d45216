"""A plan's file as it is read: its text, and its content once form, version and hash are right."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from freqopt.config import SPLIT_VERSION
from freqopt.errors import PlanError
from freqopt.files import check_path, read_bounded
from freqopt.plan.content import PLAN_VERSION
from freqopt.plan.file_text import content_hash, refuse_constant

FORMAT, SEVERAL = "freqopt-plan", "freqopt-plans"
"""What files of one plan and of several say that they are."""

MAX_FILE_BYTES = 64 * 2**20
"""Ten times the largest plan that was seen; parsed it takes 27 times as much memory."""


def read_plan(path: str | os.PathLike[str]) -> str:
    """The text of a plan's file, which may hold anything yet.

    Raises:
        PlanError: it cannot be read, is no regular file, is too large, or is no text.
        OptionError: it is no path.
    """
    check_path(path)
    source = Path(path)
    try:
        return read_bounded(source, MAX_FILE_BYTES).decode("utf-8")
    except OSError as error:
        raise PlanError(f"cannot read the plan {source}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise PlanError(f"{source} is not a plan: it is not UTF-8 text") from error


def content_of(text: str, origin: str) -> dict[str, Any]:
    """The fields that a plan's file holds, not checked one by one yet; `origin` names it in errors.

    Raises:
        PlanError: it is truncated, edited by hand, of another version, or not a plan at all.
    """
    try:
        content = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise PlanError(
            f"{origin} is not complete JSON ({error}): the file is truncated or damaged; "
            "calibrate again or copy it anew"
        ) from error
    if isinstance(content, dict) and content.get("format") == SEVERAL:
        raise PlanError(
            f"{origin} holds plans of several models: read it with freqopt.Plans.load, and "
            "take the one of this model"
        )
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise PlanError(f"{origin} is not a plan: it lacks the field format = {FORMAT!r}")
    for field, supported in (
        ("version", PLAN_VERSION),
        ("split_version", SPLIT_VERSION),
    ):
        if content.get(field) != supported:
            raise PlanError(
                f"{origin} has {field} {content.get(field)!r} and this freqopt reads "
                f"{supported}: calibrate again, or install the version that wrote it"
            )
    stated = content.pop("hash", None)
    if stated != content_hash(content):
        raise PlanError(
            f"{origin} does not match its own hash: it was edited or damaged after it was "
            "written. Change plans in Python (Plan.load, model_copy, save) or calibrate again"
        )
    return content

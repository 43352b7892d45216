"""The checkpoint: results of calibration's steps, in a file, so that an interrupted run resumes.

Every step of a calibration is a pure function of the model, the samples and the seed, so a result
that is in the checkpoint stands for the run that made it. The file is safetensors with JSON
metadata: data only, safe to load.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import freqopt
from freqopt.calibration.samples import SampleSet
from freqopt.calibration.team import Team
from freqopt.calibration.values import parts_of
from freqopt.config import SPLIT_VERSION
from freqopt.errors import CalibrationError, FileError
from freqopt.files import check_regular, check_writable, replacing
from freqopt.plan.plan import model_fingerprint

logger = logging.getLogger(__name__)

FORMAT = "freqopt-checkpoint-1"
WRITE_EVERY = 10.0
"""Seconds between writes while calibration runs; an interruption writes too."""

ALONE = Team()

DIGEST_VALUES = 1024
"""Values of each parameter that the identity looks at, evenly spaced."""


UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What readers of a file raise whose bytes are not what they should be."""


class Header(BaseModel):
    """Metadata of the file.

    Attributes:
        format: what kind of file this is.
        identity: `identity_of` the calibration.
        facts: those of all entries by key, as JSON.
        content: hash of facts and tensors, which finds damage.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: Literal["freqopt-checkpoint-1"]
    identity: str
    facts: str
    content: str


class Entry(NamedTuple):
    """Result of one step. facts: anything that JSON can express."""

    facts: Any
    tensors: Mapping[str, Tensor]


class Checkpoint:
    """Results by key. Without a path they are kept in memory only."""

    def __init__(self, path: Path | None, identity: str) -> None:
        self.path, self.identity = path, identity
        self.entries: dict[str, Entry] = {}
        self.written = time.monotonic()
        if path is not None:
            check_writable(path)
            if path.exists():
                self.entries = _read(path, identity)

    def find(self, key: str) -> Entry | None:
        """The result of a step that was done before."""
        return self.entries.get(key)

    def keep(self, key: str, facts: Any, tensors: Mapping[str, Tensor] | None = None) -> Entry:
        """Add the result of a step; returns it."""
        entry = self.entries[key] = Entry(facts, dict(tensors or {}))
        if time.monotonic() - self.written > WRITE_EVERY:
            self.write()
        return entry

    def write(self) -> None:
        """Write the file; an existing one is replaced only by a complete one.

        Raises:
            FileError: it cannot be written.
        """
        if self.path is None or not self.entries:
            return
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {
            f"{key}|{name}": tensor.contiguous()
            for key, entry in self.entries.items()
            for name, tensor in entry.tensors.items()
        }
        facts = json.dumps({key: entry.facts for key, entry in self.entries.items()})
        metadata = {"format": FORMAT, "identity": self.identity, "facts": facts}
        metadata["content"] = _content(facts, tensors)
        with replacing(self.path) as partial:
            try:
                save_file(tensors, partial, metadata=metadata)
            except SafetensorError as error:  # a full disk
                raise OSError(str(error)) from error
        self.written = time.monotonic()

    def remove(self) -> None:
        """Remove the file, which a finished calibration needs no more."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


@contextmanager
def open_checkpoint(
    path: str | os.PathLike[str] | None, identity: str, *, keep: bool = False, team: Team = ALONE
) -> Iterator[Checkpoint]:
    """A checkpoint that is written if the block is left by an exception, and removed otherwise.

    keep: write it in any case. team: processes that calibrate one model together: the first one's
    file counts, and it writes it.

    Raises:
        CalibrationError: the file is damaged, or belongs to another calibration.
    """
    where = Path(path) if path is not None and team.first else None
    checkpoint = team.together(lambda: Checkpoint(where, identity))[0]
    checkpoint.path = where
    try:
        yield checkpoint
    except BaseException:
        try:
            checkpoint.write()
        except FileError as error:  # what ended the calibration is the news
            logger.warning("what was measured since the last write is lost: %s", error)
        raise
    if keep:
        checkpoint.write()
    else:
        checkpoint.remove()


def identity_of(model: nn.Module, samples: SampleSet, **settings: Any) -> str:
    """Hash of all that results depend on: model with its values, samples, settings, versions."""
    digest = hashlib.sha256()
    versions = (freqopt.__version__, str(torch.__version__), SPLIT_VERSION)
    digest.update(repr((model_fingerprint(model), versions, sorted(settings.items()))).encode())
    for parameter in model.parameters():
        for inner in parts_of(parameter.detach()):
            step = max(1, inner.numel() // DIGEST_VALUES)
            _add(digest, inner.flatten()[::step])
    digest.update(repr((samples.timestep_name, samples.timestep_edges)).encode())
    for part in (samples.fit, samples.held_out):
        for sample in part:
            for leaf in pytree.tree_leaves((sample.args, sample.kwargs)):
                _add(digest, leaf)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(repr((value.dtype, tuple(value.shape), value.device.type)).encode())
        for part in parts_of(value.detach()):
            real = torch.view_as_real(part.resolve_conj()) if part.is_complex() else part
            flat = real.cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    elif isinstance(value, (int, float, str, bool, type(None))):
        digest.update(repr(value).encode())
    else:  # its repr may hold an address
        digest.update(type(value).__qualname__.encode())


def _content(facts: str, tensors: Mapping[str, Tensor]) -> str:
    """Hash of what a file holds, so that a damaged one is not resumed from."""
    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        _add(digest, tensors[name].cpu())
    return digest.hexdigest()


def _read(path: Path, identity: str) -> dict[str, Entry]:
    from safetensors import SafetensorError, safe_open

    advice = "delete it to calibrate from the start, or name another file"
    try:
        check_regular(path)
        with safe_open(os.fspath(path), framework="pt") as file:
            stated = file.metadata() or {}
            if stated.get("format") != FORMAT:
                raise CalibrationError(f"{path} is not a checkpoint of this version; {advice}")
            header = Header.model_validate(stated)
            if header.identity != identity:
                raise CalibrationError(
                    f"{path} keeps what was measured with another model, other weights, samples, "
                    f"settings or versions, so it cannot be resumed here; {advice}"
                )
            whole = {name: file.get_tensor(name) for name in file.keys()}
            if header.content != _content(header.facts, whole):
                raise ValueError("its content does not match its own hash")
            tensors: dict[str, dict[str, Tensor]] = {}
            for name, tensor in whole.items():
                key, _, leaf = name.rpartition("|")  # keys may hold one too
                tensors.setdefault(key, {})[leaf] = tensor
            facts = json.loads(header.facts)
            return {key: Entry(fact, tensors.get(key, {})) for key, fact in facts.items()}
    except CalibrationError:
        raise
    except (*UNREADABLE, SafetensorError) as error:
        raise CalibrationError(
            f"{path} is not a complete checkpoint ({error}); {advice}"
        ) from error

"""What of an exported folder may be opened, and what of it may run as a program.

A model is data, and so are weights that lie beside it, as long as the manifest lists them. A
library is a program: it is loaded if the user says so, or if it is, byte for byte, one that this
machine built from our sources.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from freqopt.exporters.manifest import Artifact
from freqopt.exporters.onnx.library import built_here
from freqopt.exporters.problems import ArtifactError, NotAvailableError
from freqopt.files import hash_of

IN_MEMORY = "_ORT_MEM_ADDR_"
"""In the name of a file that onnxruntime takes for an address in memory."""


def library_to_load(artifact: Artifact, *, trust: bool) -> Path | None:
    """The operator library that may be loaded for an artifact; None if it has none.

    trust: whether its maker may run programs here. Without, it is our own copy of the library in
    the cache folder, if the artifact's has the same bytes.

    Raises:
        ArtifactError: it was not built here and nobody trusts it, or the manifest does not list it.
    """
    name = artifact.manifest.get("library")
    if not name:
        return None
    path = artifact.file(str(name))
    if trust:
        return path
    own = built_here(hash_of(path))
    if own is None:
        raise ArtifactError(
            f"{path} is a program, this machine did not build it, and nobody said that its maker "
            "may run programs here: pass --trust (trust=True) if you would, or --no-library "
            "(library=False), which runs the model's own function bodies"
        )
    return own


def check_external_data(artifact: Artifact) -> None:
    """Refuse a model that reads weights from files that the manifest does not list.

    Raises:
        ArtifactError: it does, or is no ONNX model.
        NotAvailableError: onnx is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise NotAvailableError(
            f"a model's files cannot be checked without onnx ({error}); pip install 'freqopt[onnx]'"
        ) from error
    try:
        # Whatever its name ends in, onnxruntime takes it for what is named here.
        model = onnx.load(artifact.model_path, format="protobuf", load_external_data=False)
    except Exception as error:  # protobuf's own types, which vary by version
        raise ArtifactError(f"{artifact.model_path} is no ONNX model: {error}") from error
    folder = PurePosixPath(str(artifact.manifest["model"])).parent
    for tensor in _tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        # Which of several counts, and what this name of a place in memory is, versions decide.
        for location in [e.value for e in tensor.external_data if e.key == "location"] or [""]:
            listed = str(folder / location) in artifact.manifest["files"]
            if not listed or IN_MEMORY in location:
                raise ArtifactError(
                    f"{artifact.model_path} reads {tensor.name!r} from {location!r}, which is not "
                    "among the files of its manifest; export again"
                )


def _tensors(model: Any) -> Iterator[Any]:
    """Every tensor that a model holds."""
    graphs = [model.graph]
    for training in model.training_info:
        graphs += [training.initialization, training.algorithm]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes += graph.node
            continue
        for attribute in nodes.pop().attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            graphs += [attribute.g] if attribute.HasField("g") else []
            graphs += attribute.graphs

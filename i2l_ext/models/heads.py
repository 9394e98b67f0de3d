"""A model of the catalogue with heads of the user's own: trained by `i2l train`, by DiffSynth-Studio or by others."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

from i2l_ext.converters.errors import UserError
from i2l_ext.converters.files import TensorFile
from i2l_ext.decoder.spec import spec_of
from i2l_ext.models import catalogue
from i2l_ext.models.catalogue import Checkpoint, Expert, I2LModel
from i2l_ext.models.store import files_identity
from i2l_ext.requests import MakeRequest


def requested_model(request: MakeRequest) -> I2LModel:
    """The model that a request names, with the heads that it names. ValueError where it names no model.

    Raises UserError where there is no such model, or where the heads are of no known kind or do not fit it.
    """
    if request.model is None:
        raise ValueError("the model of the request must be set")
    model = catalogue.find(request.model)
    return model if request.heads is None else with_heads(model, request.heads)


def with_heads(model: I2LModel, path: Path) -> I2LModel:
    """The model with the heads of a file, whose kind and dimensions are read from its header. Raises UserError."""
    with TensorFile(path) as file:
        spec = spec_of(file.header.shapes)
    if spec is None:
        raise UserError(f"{path.name}: not the heads of an i2L model, or of a kind that is not known.")
    if len(model.experts) != 1:
        raise UserError(f"{model.name} has several heads: --heads goes with a model of one, such as qwen-image-style.")
    [own] = model.experts
    expected, found = ((s.arch.title, s.embed, s.residual and s.residual.length) for s in (own.heads.spec, spec))
    for what, wanted, given in zip(
        ("write for", "take embeddings of", "take a residual of"), expected, found, strict=True
    ):
        if wanted != given:
            raise UserError(
                f"{path.name}: its heads {what} {given or 'nothing'}, not {wanted or 'nothing'} as {model.name} has."
            )
    heads = Checkpoint(
        f"heads-{files_identity([path])}", "heads", spec, None, (str(path.absolute()),),
        sum(map(prod, spec.shapes.values())), licence="unknown",
    )  # fmt: skip
    return replace(model, experts=(Expert(heads, own.view),))

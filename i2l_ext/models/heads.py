"""A model of the catalogue with heads of the user's own: trained by `i2l train`, by DiffSynth-Studio or by others.

Heads that see all pictures together take SigLIP2's patch tokens alone, so the model then has no other encoder.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

from i2l_ext.converters.errors import UserError
from i2l_ext.converters.files import TensorFile
from i2l_ext.decoder.spec import DecoderSpec, nearest_spec, spec_of
from i2l_ext.models import catalogue
from i2l_ext.models.catalogue import Checkpoint, Expert, I2LModel
from i2l_ext.models.store import files_identity
from i2l_ext.requests import MakeRequest
from i2l_ext.weights.packing import weights_of
from i2l_ext.weights.structure import check_structure


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
    spec = _spec_in(path)
    if len(model.experts) != 1 or model.siglip2 is None:
        raise UserError(f"{model.name} has several heads: --heads goes with a model of one, such as qwen-image-style.")
    [own] = model.experts
    known, view = own.heads.spec, own.view
    width, residual = known.takes[1], known.residual
    if spec.sees_together:
        width, residual, view = model.siglip2.spec.width, None, None
        model = seeing_patches(model)
    for what, wanted, given in (
        ("write for", model.arch.title, spec.arch.title),
        (f"take {spec.takes[0]} of", width, spec.takes[1]),
        ("take a residual of", residual and residual.length, spec.residual and spec.residual.length),
    ):
        if wanted != given:
            raise UserError(
                f"{path.name}: its heads {what} {given or 'nothing'}, not {wanted or 'nothing'} as {model.name} has."
            )
    heads = Checkpoint(
        f"heads-{files_identity([path])}", "heads", spec, None, (str(path.absolute()),),
        sum(map(prod, spec.shapes.values())), licence="unknown",
    )  # fmt: skip
    return replace(model, experts=(Expert(heads, view),))


def seeing_patches(model: I2LModel) -> I2LModel:
    """The model with SigLIP2's patch tokens as its only encoder's result. ValueError where it has no SigLIP2."""
    if model.siglip2 is None:
        raise ValueError(f"{model.name} has no SigLIP2")
    return replace(model, siglip2=model.siglip2.as_patches(), dinov3=None, qwen_vl=None)


def _spec_in(path: Path) -> DecoderSpec:
    """The decoder whose checkpoint the file is. Raises UserError; it names the tensor where only little differs."""
    with TensorFile(path) as file:
        shapes = {key: info.shape for key, info in weights_of(file.header).items()}
    spec = spec_of(shapes)
    if spec is not None:
        return spec
    if nearest := nearest_spec(shapes):
        check_structure(path.name, nearest.shapes, shapes)
    raise UserError(f"{path.name}: not the heads of an i2L model, or of a kind that is not known.")

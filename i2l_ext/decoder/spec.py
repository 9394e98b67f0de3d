"""What a decoder is made of: its heads by module, and the shape of every tensor. Importing this does not import torch,
so that a WebUI's own process can read the catalogue."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, product

from i2l_ext.converters.architectures import ARCHITECTURES, Architecture, Module
from i2l_ext.decoder.kinds import HEAD_KINDS, Shapes

RESIDUAL_SCALE = 0.05
"""The factor on the residual's tokens. The published models were trained with it."""


@dataclass(frozen=True)
class ResidualSpec:
    """The sequence that refines the heads: ``length`` tokens of width ``dim``, each mapped to ``mid`` numbers. It is
    compressed to one vector for each block and group, which is added in the middle of all maps of their heads."""

    length: int
    dim: int
    mid: int


@dataclass(frozen=True)
class TransformerSpec:
    """The single-stream transformer of the kind *queries*: ``depth`` blocks of ``width`` numbers a token, ``heads`` of
    attention of ``head_dim`` numbers each, and a gated MLP of ``mlp``. It sees tokens of ``token`` numbers."""

    token: int
    width: int
    depth: int
    heads: int
    head_dim: int
    mlp: int

    @property
    def ends(self) -> Shapes:
        """{key: shape} of what stands before and behind the blocks."""
        return {"image.weight": (self.width, self.token), "image.bias": (self.width,), "norm.weight": (self.width,)}

    @property
    def block(self) -> Shapes:
        """{key: shape} of one block, without its prefix ``blocks.N.``."""
        inside = self.heads * self.head_dim
        return {
            "attention_norm.weight": (self.width,),
            "attention.qkv.weight": (3 * inside, self.width),
            "attention.norm_q.weight": (self.head_dim,),
            "attention.norm_k.weight": (self.head_dim,),
            "attention.out.weight": (self.width, inside),
            "mlp_norm.weight": (self.width,),
            "mlp.up.weight": (2 * self.mlp, self.width),
            "mlp.down.weight": (self.width, self.mlp),
        }

    def names(self, number: int) -> dict[str, str]:
        """{name inside a block: key in the file} of the block with this number."""
        return {name: f"blocks.{number}.{name}" for name in self.block}

    @property
    def shapes(self) -> Shapes:
        """{key: shape} of all its tensors but the queries, which belong to the heads."""
        blocks = (zip(self.names(number).values(), self.block.values(), strict=True) for number in range(self.depth))
        return self.ends | {key: shape for block in blocks for key, shape in block}


@dataclass(frozen=True)
class HeadSpec:
    """The head that writes the factors of one module. ``key`` is the start of its tensors' names, ``block`` that of
    the tensors that its block and group share."""

    module: Module
    key: str
    block: str


@dataclass(frozen=True)
class DecoderSpec:
    """The dimensions of a decoder: the architecture it writes for, and the width of the embeddings that its heads take.
    ``kind`` is one of HEAD_KINDS. ``compress``: the width in the middle of its maps; 0 where the kind has none.
    ``transformer``: what sees the tokens of all pictures together before the heads, in the kind ``queries``; the
    embeddings that the heads take are then its vectors."""

    arch: Architecture
    embed: int
    compress: int
    rank: int = 4
    residual: ResidualSpec | None = None
    kind: str = "direct"
    transformer: TransformerSpec | None = None

    @property
    def sees_together(self) -> bool:
        """Whether all pictures go in together, and the rank does not grow with them."""
        return self.transformer is not None

    @property
    def takes(self) -> tuple[str, int]:
        """What a picture is to the decoder, in words, and the width of that."""
        return ("patch tokens", self.transformer.token) if self.transformer else ("embeddings", self.embed)

    @cached_property
    def heads(self) -> dict[str, HeadSpec]:
        """By module path. The heads of a stack are ordered by group, then by block, then by layer."""
        return {head.module.path: head for head in self._heads()}

    def _heads(self) -> Iterator[HeadSpec]:
        for stack in self.arch.stacks:
            prefix = "" if len(self.arch.stacks) == 1 else f"{stack.name}_lora."
            made = sorted((kind for kind in stack.kinds if kind.group is not None), key=lambda kind: kind.group or 0)
            for group, kinds in groupby(made, key=lambda kind: kind.group or 0):
                names = [kind.name for kind in kinds]
                for number in range(stack.depth):
                    block = f"{prefix}blocks.{group * stack.depth + number}"
                    for layer, name in enumerate(names):
                        module = self.arch.modules[f"{stack.name}.{number}.{name}"]
                        yield HeadSpec(module, self._key(module, block, layer), block)

    def _key(self, module: Module, block: str, layer: int) -> str:
        if HEAD_KINDS[self.kind].by_path:
            return f"module_dict.{module.path.replace('.', '___')}"
        return f"{block}.layers.{layer}"

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint, {key: shape}."""
        own = {key: shape for shapes in self.tensors.values() for key, shape in shapes.items()}
        return own | self.queries | (self.transformer.shapes if self.transformer else {})

    @cached_property
    def queries(self) -> Shapes:
        """{key: shape} of the queries, in the order of ``heads``: for each first those for down, then those for up."""
        names = HEAD_KINDS[self.kind].queries
        return {f"{head.key}.{name}": (self.rank, self.embed) for head in self.heads.values() for name in names}

    @cached_property
    def tensors(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """{key: shape} of the tensors of each head, by ``HeadSpec.key``, and of those that the heads of a block and
        group share, by ``HeadSpec.block``."""
        tensors: dict[str, dict[str, tuple[int, ...]]] = {}
        for head in self.heads.values():
            maps, others = HEAD_KINDS[self.kind].layout(self.rank, *head.module.shape, self.embed)
            own = tensors[head.key] = {f"{head.key}.{name}": shape for name, shape in others.items()}
            for name, width in maps.items():
                own[f"{head.key}.{name}.proj_in.weight"] = (self.compress, self.embed)
                own[f"{head.key}.{name}.proj_out.weight"] = (width, self.compress)
            if self.residual:
                length, dim, mid = self.residual.length, self.residual.dim, self.residual.mid
                tensors[head.block] = {
                    f"{head.block}.proj_residual.proj_in.weight": (mid, dim),
                    f"{head.block}.proj_residual.proj_out.weight": (self.compress, length * mid),
                }
        return tensors


def spec_of(shapes: Shapes) -> DecoderSpec | None:
    """The decoder whose checkpoint has exactly these tensors, {key: shape}; None where it is of no known kind, or for
    no architecture that i2L models write."""
    return next((spec for spec in _candidates(shapes) if spec.shapes == shapes), None)


def nearest_spec(shapes: Shapes) -> DecoderSpec | None:
    """The decoder whose checkpoint shares most tensors with these, {key: shape}; None where none does by half. A file
    that is not quite right is compared with it."""
    shared = [(len(spec.shapes.items() & shapes.items()), spec) for spec in _candidates(shapes)]
    most, nearest = max(shared, key=lambda one: one[0], default=(0, None))
    return nearest if 2 * most >= len(shapes) else None


def _candidates(shapes: Shapes) -> Iterator[DecoderSpec]:
    """Of each architecture and kind the decoder whose first head has the dimensions of the one in ``shapes``."""
    for arch, kind in product(ARCHITECTURES.values(), HEAD_KINDS):
        if not arch.i2l_modules:
            continue
        first = next(iter(DecoderSpec(arch, 1, 1, kind=kind).heads.values()))
        own = {key.removeprefix(first.key + "."): shape for key, shape in shapes.items() if key.startswith(first.key)}
        try:
            embed, compress, rank = HEAD_KINDS[kind].measure(own, first.module.shape[1])
            residual, transformer = _residual_of(shapes, first.block), None
            if HEAD_KINDS[kind].queries:
                transformer = _transformer_of(shapes)
                embed = transformer.width
        except (LookupError, TypeError, ValueError, ZeroDivisionError):
            continue
        if rank:
            yield DecoderSpec(arch, embed, compress, rank, residual, kind, transformer)


def _transformer_of(shapes: Shapes) -> TransformerSpec:
    """Its dimensions by the header. Where they contradict each other, its shapes are not those of the header."""
    width, token = shapes["image.weight"]
    [head_dim] = shapes["blocks.0.attention.norm_q.weight"]
    heads = shapes["blocks.0.attention.qkv.weight"][0] // 3 // head_dim
    depth = len({key.split(".")[1] for key in shapes if key.startswith("blocks.")})
    return TransformerSpec(token, width, depth, heads, head_dim, shapes["blocks.0.mlp.down.weight"][1])


def _residual_of(shapes: Shapes, block: str) -> ResidualSpec | None:
    mid, dim = shapes.get(f"{block}.proj_residual.proj_in.weight", (0, 0))
    return ResidualSpec(shapes[f"{block}.proj_residual.proj_out.weight"][1] // mid, dim, mid) if mid else None

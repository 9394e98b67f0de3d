"""What an architecture is: every linear layer of a model, by name and shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property


@dataclass(frozen=True)
class LayerKind:
    """One linear layer that every block of a stack has, weight [d_out, d_in].

    ``group`` is the number of the head group that writes it in the i2L models; None where they do not write it.
    """

    name: str
    d_in: int
    d_out: int
    group: int | None = None


@dataclass(frozen=True)
class LayerStack:
    """``depth`` equal blocks, ``name.0`` to ``name.{depth-1}``, each with the same kinds of layers."""

    name: str
    depth: int
    kinds: tuple[LayerKind, ...]


@dataclass(frozen=True)
class Module:
    """One linear layer of a model, at ``path``. ``stack`` and ``block`` are None for a layer outside the stacks."""

    path: str
    kind: LayerKind
    stack: str | None = None
    block: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight: (d_out, d_in)."""
        return self.kind.d_out, self.kind.d_in


@dataclass(frozen=True)
class Architecture:
    """A model: its stacks of blocks, and its layers outside them (``singles``).

    ``family`` names the class of models that loads it. ``native``: how the first implementation names the layers that
    it does not call as we do: its name -> our layers whose rows it holds, in order (one layer: only the name differs;
    several: they are fused). ``*`` stands for the number of the block. ``aliases``: further names of the same form, of
    programs that fuse layers for speed; they are read and never written.
    ``key_format`` is that of its LoRAs unless another is asked for: one that the programs which generate with it read.
    ``caution`` is what a user must know first, where no other program has such a model.
    """

    id: str
    title: str
    family: str
    stacks: tuple[LayerStack, ...]
    singles: tuple[LayerKind, ...] = ()
    native: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    key_format: str = "webui"
    caution: str = ""

    @cached_property
    def modules(self) -> dict[str, Module]:
        """Every linear layer that a LoRA may change, by path: the single layers first, then stack by stack."""
        return {module.path: module for module in self._iter_modules()}

    @cached_property
    def i2l_modules(self) -> dict[str, Module]:
        """The layers that an i2L model writes, by path."""
        return {path: module for path, module in self.modules.items() if module.kind.group is not None}

    @cached_property
    def depths(self) -> dict[str, int]:
        """Number of blocks, by the name of a stack: ours, and the first implementation's."""
        ours = {stack.name: stack.depth for stack in self.stacks}
        native = {_stack(name): ours[_stack(parts[0])] for name, parts in self.native.items() if "*" in name}
        return ours | native

    @cached_property
    def fused(self) -> Architecture:
        """The same model in the layers of its first implementation, as `native` names them."""
        names = {part: name for name, parts in self.native.items() for part in parts}
        ours = {kind.name: kind for kind in self.singles}
        ours |= {f"{stack.name}.*.{kind.name}": kind for stack in self.stacks for kind in stack.kinds}
        layers: dict[str, list[LayerKind]] = {}
        for pattern, kind in ours.items():
            layers.setdefault(names.get(pattern, pattern), []).append(kind)
        stacks: dict[str, list[LayerKind]] = {}
        for pattern, kinds in layers.items():
            stack, _, name = pattern.rpartition(".*.")
            stacks.setdefault(stack, []).append(LayerKind(name, kinds[0].d_in, sum(kind.d_out for kind in kinds)))
        singles = tuple(stacks.pop("", ()))
        made = tuple(LayerStack(name, self.depths[name], tuple(kinds)) for name, kinds in stacks.items())
        return replace(self, stacks=made, singles=singles, native={}, aliases={})

    def expanded(self, names: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        """``native`` or ``aliases`` with the number of every block for ``*``: name -> paths of our modules."""
        return {
            name.replace("*", str(block)): tuple(part.replace("*", str(block)) for part in parts)
            for name, parts in names.items()
            for block in range(self.depths[_stack(parts[0])] if "*" in name else 1)
        }

    def _iter_modules(self) -> Iterator[Module]:
        for kind in self.singles:
            yield Module(kind.name, kind)
        for stack in self.stacks:
            for block in range(stack.depth):
                for kind in stack.kinds:
                    yield Module(f"{stack.name}.{block}.{kind.name}", kind, stack.name, block)


def _stack(pattern: str) -> str:
    return pattern.partition(".*")[0]

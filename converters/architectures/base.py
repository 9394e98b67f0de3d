"""What an architecture is: every linear layer of a model, by name and shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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

    ``family`` names the class of models that loads it. For implementations that name layers otherwise: ``fused`` maps
    the name of a fused layer to the kinds whose rows it holds, in order; ``renamed`` maps a name to ours.
    ``caution`` is what a user must know first, where no other program has such a model.
    """

    id: str
    title: str
    family: str
    stacks: tuple[LayerStack, ...]
    singles: tuple[LayerKind, ...] = ()
    fused: Mapping[str, tuple[str, ...]] | None = None
    renamed: Mapping[str, str] | None = None
    caution: str = ""

    @cached_property
    def modules(self) -> dict[str, Module]:
        """Every linear layer that a LoRA may change, by path: the single layers first, then stack by stack."""
        return {module.path: module for module in self._iter_modules()}

    @cached_property
    def i2l_modules(self) -> dict[str, Module]:
        """The layers that an i2L model writes, by path."""
        return {path: module for path, module in self.modules.items() if module.kind.group is not None}

    def _iter_modules(self) -> Iterator[Module]:
        for kind in self.singles:
            yield Module(kind.name, kind)
        for stack in self.stacks:
            for block in range(stack.depth):
                for kind in stack.kinds:
                    yield Module(f"{stack.name}.{block}.{kind.name}", kind, stack.name, block)

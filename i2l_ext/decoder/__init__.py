"""Embeddings -> LoRA: the heads of an i2L model.

``spec`` says what a decoder is made of and imports no torch; ``kinds`` has the kinds of heads; ``decode`` reads a
checkpoint and computes the factors; ``transformer`` is what stands before the heads of the kind ``queries``.
"""

from i2l_ext.decoder.spec import DecoderSpec, ResidualSpec, TransformerSpec

__all__ = ["DecoderSpec", "ResidualSpec", "TransformerSpec"]

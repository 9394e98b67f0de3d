"""Pictures to embeddings, on transformers' own SigLIP, DINOv3 and Qwen2.5-VL modules.

``dims`` says how big a model is and needs neither torch nor transformers. ``siglip2``, ``dinov3`` and ``qwen_vl``
have the same three functions each: ``config(dims)``, ``structure(dims)`` and ``encode(paths, dims, batches, options,
callbacks)``.
"""

"""i2L models that come with code of their own: the authors' v2 models are *templates* of DiffSynth-Studio.

That code runs only if the user has seen whose it is and has agreed to its very hash (``repository``, ``consent``). It
runs in a process of an installed DiffSynth-Studio, shut in as far as the system can (``cage``, ``child``). What comes
back is a file of tensors, which is checked like any stranger's LoRA (``run``).
"""

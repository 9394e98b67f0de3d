"""LoRA files and nothing else: what they say, and how to say it otherwise.

Reached as ``i2l_ext.converters``: inside a WebUI another extension may own the bare name.
"""

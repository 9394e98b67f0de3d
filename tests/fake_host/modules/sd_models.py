from types import SimpleNamespace

model_data = SimpleNamespace(sd_model=object())
unloaded = []


def unload_model_weights():
    unloaded.append(1)
    model_data.sd_model = None

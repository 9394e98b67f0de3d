"""A model and what is to be done to it: patches of its weights by key, wrappers of its calls."""

import copy


class ModelPatcher:
    def __init__(self, model):
        self.model, self.patches, self.wrappers = model, {}, {}

    def clone(self):
        other = ModelPatcher(self.model)
        other.patches = {key: list(parts) for key, parts in self.patches.items()}
        other.wrappers = copy.copy(self.wrappers)
        return other

    def add_patches(self, patches, strength):
        for key, patch in patches.items():
            self.patches.setdefault(key, []).append((strength, patch))

    def get_wrappers(self, kind, key):
        return self.wrappers.get((kind, key), [])

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers.pop((kind, key), None)

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers[kind, key] = [*self.get_wrappers(kind, key), wrapper]


class Executor:
    """Calls a model through its wrappers, as ComfyUI's sampling does."""

    def __init__(self, patcher, wrappers):
        self.class_obj, self.wrappers, self.patcher = patcher.model, wrappers, patcher

    def __call__(self, *args, **kwargs):
        if self.wrappers:
            return self.wrappers[0](Executor(self.patcher, self.wrappers[1:]), *args, **kwargs)
        return self.class_obj.apply_model(*args, **kwargs)


def call(patcher, *args, **kwargs):
    wrappers = [one for (kind, _), those in patcher.wrappers.items() if kind == "apply_model" for one in those]
    return Executor(patcher, wrappers)(*args, **kwargs)

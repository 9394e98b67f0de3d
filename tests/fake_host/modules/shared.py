import os
import sys
from types import SimpleNamespace

from modules import paths

FLAVOUR = os.environ.get("FAKE_FLAVOUR", "a1111")
cmd_opts = SimpleNamespace(
    lora_dir=os.path.join(paths.models_path, "Lora"), listen=False, share=False, server_name=None, ngrok=None,
    api=os.environ.get("FAKE_API") == "1", api_auth=os.environ.get("FAKE_API_AUTH"), gradio_auth=None,
    gradio_auth_path=None, port=None,
)  # fmt: skip
if FLAVOUR == "forge-neo":
    cmd_opts.lora_dirs = []


class OptionInfo:
    def __init__(self, default=None, label="", component=None, component_args=None, section=None):
        self.default, self.label, self.component = default, label, component
        self.component_args, self.section, self.comment = component_args, section, ""

    def info(self, text):
        self.comment = text
        return self


class Options:
    def __init__(self):
        object.__setattr__(self, "data_labels", {})

    def add_option(self, key, info):
        info.section and self.data_labels.__setitem__(key, info)

    def __getattr__(self, key):
        if key in self.data_labels:
            return self.data_labels[key].default
        if key in ("localization", "ui_locale"):
            return os.environ.get("FAKE_LANGUAGE", "None")
        raise AttributeError(key)


opts = Options()


class Shared(type(sys.modules[__name__])):
    """Reading ``sd_model`` loads the checkpoint."""

    @property
    def sd_model(self):
        from modules import sd_models

        return sd_models.model_data.get_sd_model()


sys.modules[__name__].__class__ = Shared

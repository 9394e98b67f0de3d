"""ComfyUI's own loader."""

import comfy.sd
import folder_paths
from safetensors.torch import load_file


class LoraLoaderModelOnly:
    def load_lora_model_only(self, model, lora_name, strength_model):
        tensors = load_file(folder_paths.get_full_path("loras", lora_name))
        return (comfy.sd.load_lora_for_models(model, None, tensors, strength_model, 0)[0],)

"""Patching: it reads lora_A and lora_B below diffusion_model., and no alpha."""


def load_lora_for_models(model, clip, lora, strength_model, strength_clip, lora_metadata=None):
    patched, patches = model.clone(), {}
    for key, down in lora.items():
        if key.startswith("diffusion_model.") and key.endswith(".lora_A.weight"):
            path = key.removeprefix("diffusion_model.").removesuffix(".lora_A.weight")
            patches[path] = lora[key.replace("lora_A", "lora_B")].float() @ down.float()
    patched.add_patches(patches, strength_model)
    return patched, clip

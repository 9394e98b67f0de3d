"""What we use of ComfyUI's module: folders of models, and lists of their files."""

import os
from pathlib import Path

models_dir = os.environ["I2L_TEST_COMFY"]
folder_names_and_paths = {
    kind: ([os.path.join(models_dir, kind)], {".safetensors"}) for kind in ("loras", "text_encoders", "clip_vision")
}
filename_list_cache = {}


def get_folder_paths(kind):
    return folder_names_and_paths[kind][0][:]


def get_filename_list(kind):
    if kind not in filename_list_cache:
        filename_list_cache[kind] = sorted(
            path.relative_to(folder).as_posix()
            for folder in get_folder_paths(kind)
            for path in Path(folder).rglob("*.safetensors")
        )
    return filename_list_cache[kind]


def get_full_path(kind, name):
    paths = (Path(folder) / name for folder in get_folder_paths(kind))
    return next((str(path) for path in paths if path.is_file()), None)


def get_temp_directory():
    return os.path.join(models_dir, "temp")

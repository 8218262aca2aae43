"""Model folders on disk: where they lie, their tensor files and their JSON files.

What is missing or malformed raises `InputError`, with the file and the mend.
"""

import importlib.util
import json
import pathlib
import shlex
from typing import Any

from rqv2_jax.errors import InputError

TENSORS = "model.safetensors"
# Names the files of a model that is saved in several.
INDEX = f"{TENSORS}.index.json"
PICKLE = "pytorch_model.bin"


def find_folder(weights: str, setting: str = "weights") -> pathlib.Path:
    """Returns the model folder `weights` names: a path, or an installed package with `model/`."""
    folder = pathlib.Path(weights)
    if folder.is_dir():
        return folder
    spec = importlib.util.find_spec(weights) if weights.isidentifier() else None
    if spec is None or spec.origin is None:
        raise InputError(
            f"config.model.{setting}: {weights!r} is neither a folder nor an installed package; "
            "give a Hugging Face BERT folder with config.json, model.safetensors and tokenizer"
        )
    return pathlib.Path(spec.origin).parent / "model"


def check_there(folder: pathlib.Path) -> None:
    """Raises InputError if a model folder that has been opened is not there any more."""
    if not folder.is_dir():
        raise InputError(
            f"{folder}: this model folder is gone; bring it back, then give the same command again"
        )


def tensor_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the safetensors files of a model: one, or the shards that an index names."""
    check_there(folder)
    if (folder / TENSORS).is_file():
        return [folder / TENSORS]
    index = folder / INDEX
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise InputError(f"{index}: has no weight_map; copy the model's own index again")
        files = [folder / str(name) for name in sorted(set(shards.values()))]
        for file in files:
            if not file.is_file():
                raise InputError(
                    f"{file}: missing, though {INDEX} names it; copy it beside the others"
                )
        return files
    if (folder / PICKLE).is_file():
        # Quoted, so that the line can be pasted into a shell whatever the folder is called.
        script = (
            "import sys, torch, safetensors.torch as s; w = torch.load(sys.argv[1], "
            "weights_only=True); s.save_file({k: v.clone().contiguous() for k, v in w.items()}, "
            "sys.argv[2])"
        )
        quoted = [shlex.quote(str(folder / name)) for name in (PICKLE, TENSORS)]
        raise InputError(
            f"{folder / PICKLE}: pickled weights are never loaded; convert them, where torch is "
            f'installed, by: python -c "{script}" {" ".join(quoted)}'
        )
    raise InputError(
        f"{folder / TENSORS}: missing; save the model with transformers' "
        "save_pretrained(folder, safe_serialization=True)"
    )


def read_json(
    path: pathlib.Path, kind: type[Any] = dict, *, optional: bool = False, **settings: Any
) -> Any:
    """Returns the object, or list, in a JSON file; with `optional`, an empty one if there is no file.

    `settings` are the types of some of the object's settings, where these are there and not null.
    """
    if optional and not path.is_file():
        return kind()
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise InputError(f"{path}:{e.lineno}: not JSON ({e.msg}); restore the model's file") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 ({e}); restore the model's file") from e
    if not isinstance(content, kind):
        name = "object" if kind is dict else "list"
        raise InputError(f"{path}: holds no JSON {name}; restore the model's file")
    for key, wanted in settings.items():
        value = content.get(key)
        if value is not None and (not isinstance(value, wanted) or isinstance(value, bool)):
            raise InputError(f"{path}: {key} is {value!r}; restore the model's file")
    return content

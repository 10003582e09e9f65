# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Loads a saved folder with transformers alone, and writes its weights and outputs to a file.

    python without_package.py FOLDER OUTPUTS.safetensors

`verification.py` runs this file in its own process. It imports nothing of this package and stops the code files of the
folder from importing the package.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module

PROCESSOR_CONFIG = "processor_config.json"
CAPTIONS = ["a photo of a cat", "two dogs"]


def load_without_package(folder: str) -> tuple[Any, Any]:
    """Loads the model with an Auto class, or with the folder's code, and the processor if there is one.

    Raises:
        OSError, KeyError, ImportError: if the folder is not complete.
    """
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    model_class = f"modeling_mlip.{config['architectures'][0]}"
    auto_classes = [name for name, reference in config["auto_map"].items() if reference == model_class]
    if auto_classes:
        loader = getattr(transformers, auto_classes[0])
    else:  # transformers has no Auto class for a tower with its projection
        loader = get_class_from_dynamic_module(model_class, folder)
    model = loader.from_pretrained(folder, trust_remote_code=True)
    if (Path(folder) / PROCESSOR_CONFIG).is_file():
        return model, transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    return model, None


@torch.inference_mode()
def collect_outputs(model: Any, processor: Any) -> dict[str, torch.Tensor]:
    """Everything that must be equal after loading, by name.

    These are all parameters and buffers, the tensors that the model returns for fixed random inputs ("output ..."), and
    what the processor makes of an image and two captions ("processor ...").
    """
    vision = getattr(model.config, "vision_config", model.config)
    text = getattr(model.config, "text_config", model.config)
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, torch.Tensor] = {}
    if "image" in model.input_modalities:
        size = vision.image_size
        inputs["pixel_values"] = torch.randn(2, 3, size, size, generator=generator).to(model.dtype)
    if "text" in model.input_modalities and model.main_input_name != "pixel_values":
        inputs["input_ids"] = torch.randint(0, text.vocab_size, (2, text.max_position_embeddings), generator=generator)
        inputs["input_ids"][:, -1] = text.eos_token_id
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    outputs = model.eval()(**inputs)
    tensors |= {f"output {name}": value for name, value in outputs.items() if torch.is_tensor(value)}
    if processor is not None:
        image = Image.linear_gradient("L").convert("RGB")
        encoded = processor(text=CAPTIONS, images=image, padding=True, return_tensors="pt")
        tensors |= {f"processor {name}": value for name, value in encoded.items()}
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


if __name__ == "__main__":
    sys.modules["modeling_mlip"] = None  # type: ignore[assignment]
    save_file(collect_outputs(*load_without_package(sys.argv[1])), sys.argv[2])

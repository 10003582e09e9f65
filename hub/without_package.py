# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""What a saved folder turns into where only transformers is installed; `push.py` runs this file in its own process.

python reload.py FOLDER OUT.safetensors

It imports nothing of ours, and forbids the folder's code to.
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


def load_as_stranger(folder: str) -> tuple[Any, Any]:
    """Model and processor through the Auto classes that the folder's configuration names, or by its own code."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    wanted = f"modeling_mlip.{config['architectures'][0]}"
    auto_classes = [name for name, model in config["auto_map"].items() if model == wanted]
    if auto_classes:
        loader = getattr(transformers, auto_classes[0])
    else:  # a tower with its projection: transformers has no Auto class for it
        loader = get_class_from_dynamic_module(wanted, folder)
    model = loader.from_pretrained(folder, trust_remote_code=True)
    if (Path(folder) / PROCESSOR_CONFIG).is_file():
        return model, transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    return model, None


@torch.inference_mode()
def observe(model: Any, processor: Any) -> dict[str, torch.Tensor]:
    """All that has to come back: every weight and buffer by name, what the processor makes of an image and captions,
    and every tensor that the model makes of fixed inputs."""
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
    seen = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    seen |= {f"output {name}": value for name, value in model.eval()(**inputs).items() if torch.is_tensor(value)}
    if processor is not None:
        picture = Image.linear_gradient("L").convert("RGB")
        encoded = processor(text=CAPTIONS, images=picture, padding=True, return_tensors="pt")
        seen |= {f"processor {name}": value for name, value in encoded.items()}
    return {name: value.detach().cpu().contiguous().clone() for name, value in seen.items()}


if __name__ == "__main__":
    sys.modules["modeling_mlip"] = None  # type: ignore[assignment]
    save_file(observe(*load_as_stranger(sys.argv[1])), sys.argv[2])

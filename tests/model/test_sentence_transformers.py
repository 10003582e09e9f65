# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""sentence-transformers loads a saved folder as it is, and gives the embeddings of the model."""

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor


@torch.no_grad()
def test_sentence_transformers_encodes_words_and_images_as_the_model_does(sources, splits):
    captions, images = ["a red star", "a large blue ring"], list(splits["validation"].select(range(2))["image"])
    theirs = SentenceTransformer(sources["mlip"], trust_remote_code=True, device="cpu")
    model, processor = AutoModel.from_pretrained(sources["mlip"]).eval(), AutoProcessor.from_pretrained(sources["mlip"])
    inputs = processor(text=captions, images=images, padding=True, return_tensors="pt")
    texts = model.get_text_features(inputs.input_ids, inputs.attention_mask).pooler_output
    pixels = model.get_image_features(inputs.pixel_values).pooler_output
    np.testing.assert_allclose(theirs.encode(captions), texts.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(theirs.encode(images), pixels.numpy(), rtol=0, atol=1e-5)

# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""What a source may look like, and bad input: each refused in one line, with nothing written."""

import json
import os
import pickle
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from conversion_cases import TEXT, VISION, clip_folder, model_cfg_of, open_clip_folder, open_clip_model
from safetensors.torch import load_file, save_file

from modeling_mlip.conversion import checkpoint_sources as sources
from modeling_mlip.conversion.checkpoints import convert, convert_checkpoint
from modeling_mlip.conversion.convert import main


@pytest.fixture(scope="module")
def state() -> dict:
    return open_clip_model("plain").state_dict()


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict:
    model, _ = convert_checkpoint(open_clip_folder(tmp_path_factory.mktemp("plain")))
    return model.state_dict()


def config_file(folder: Path, variant: str = "plain") -> str:
    (folder / "model.json").write_text(json.dumps(model_cfg_of(variant)))
    return str(folder / "model.json")


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + key: tensor for key, tensor in state.items()}


def custom_text(state: dict) -> dict:
    top = ("visual.", "logit_scale")
    return {key if key.startswith(top) else f"text.{key}": tensor for key, tensor in state.items()}


CHECKPOINTS = {
    "training": lambda state: {"epoch": 3, "name": "run", "state_dict": prefixed(state, "module."),
                               "optimizer": {"state": {0: {"step": torch.ones(())}}, "param_groups": [{"lr": 1e-3}]}},
    "compiled": lambda state: {"state_dict": prefixed(state, "_orig_mod.")},
    "compiled and distributed": lambda state: {"state_dict": prefixed(state, "module._orig_mod.")},
    "averaged": lambda state: {"n_averaged": torch.tensor(5), **prefixed(state, "module.")},
    "ema beside the live weights": lambda state: {
        "initted": torch.tensor(True), "step": torch.tensor(1), **prefixed(state, "ema_model."),
        **{f"online_model.{key}": tensor + 1 for key, tensor in state.items()}},
    "custom text": custom_text,
    "bare": lambda state: state,
    "logit_scale of one element": lambda state: {**state, "logit_scale": state["logit_scale"][None]},
}  # fmt: skip


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoint_files_are_read_through_their_wrapping(tmp_path, state, expected, kind):
    torch.save(CHECKPOINTS[kind](state), tmp_path / "epoch_3.pt")
    model, _ = convert_checkpoint(tmp_path / "epoch_3.pt", model=config_file(tmp_path))
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in expected.items())


def test_files_of_old_torch_are_read(tmp_path, state, expected):
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    model, _ = convert_checkpoint(tmp_path / "old.bin", model=config_file(tmp_path))
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in expected.items())


def test_shards_are_read_and_a_lost_one_is_named(tmp_path, state, expected):
    folder = open_clip_folder(tmp_path / "sharded")
    (folder / "open_clip_model.safetensors").unlink()
    parts = {"a.safetensors": list(state)[::2], "b.safetensors": list(state)[1::2]}
    for file, keys in parts.items():
        save_file({key: state[key] for key in keys}, folder / file)
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    (folder / "open_clip_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model, _ = convert_checkpoint(folder)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in expected.items())
    (folder / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names the shard b\.safetensors"):
        convert_checkpoint(folder)


def openai_state() -> dict:
    """As OpenAI's files are: heads 64 wide, float16 but for the norms, three numbers beside the weights."""
    torch.manual_seed(0)
    vision, text = VISION | {"width": 128, "head_width": 64}, TEXT | {"width": 64, "heads": 1}
    model = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text, quick_gelu=True)
    open_clip.model.convert_weights_to_fp16(model)
    extras = {"input_resolution": 32, "context_length": 12, "vocab_size": 49408}
    return model.state_dict() | {key: torch.tensor(value) for key, value in extras.items()}


def test_openai_state_dict_needs_no_config_and_has_quick_gelu(tmp_path):
    torch.save(openai_state(), tmp_path / "ViT-B-32.pt")
    conversion = convert(tmp_path / "ViT-B-32.pt")
    assert conversion.model.config.vision_config.hidden_act == "quick_gelu"
    assert conversion.model.config.text_config.hidden_act == "quick_gelu"
    assert conversion.model.dtype == torch.float32
    assert conversion.report.passed


def test_activation_is_not_guessed(tmp_path, state):
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="do not tell GELU from QuickGELU"):
        convert_checkpoint(tmp_path / "model.pt")
    ours, _ = convert_checkpoint(tmp_path / "model.pt", model=config_file(tmp_path, "quickgelu"))
    assert ours.config.vision_config.hidden_act == "quick_gelu"
    ours, _ = convert_checkpoint(tmp_path / "model.pt", model=config_file(tmp_path))
    assert ours.config.vision_config.hidden_act == "gelu"


@pytest.mark.parametrize(
    ("name", "tower"),
    [
        ("RN50", "ResNet"),
        ("convnext_base", "convnext_base"),
        ("ViTamin-B", "timm image tower vitamin_base_224"),
        ("mt5-base-ViT-B-32", "Hugging Face text tower google/mt5-base"),
    ],
)
def test_other_towers_are_refused_in_one_line_before_weights_are_read(tmp_path, name, tower):
    cfg = {"model_cfg": open_clip.get_model_config(name)}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(cfg))
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"not read")
    with pytest.raises(ValueError, match=tower) as refusal:
        main([str(tmp_path), str(tmp_path / "mlip")])
    assert "\n" not in str(refusal.value) and "the ViTs of OpenCLIP" in str(refusal.value)
    assert not (tmp_path / "mlip").exists()
    with pytest.raises(ValueError, match="is not supported"):
        convert_checkpoint(tmp_path / "open_clip_model.safetensors", model=name)


def test_other_models_of_transformers_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blip"}))
    with pytest.raises(ValueError, match="'blip', which is not supported"):
        convert_checkpoint(tmp_path)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch, state):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": state, "extra": Payload()}, "evil.pt")
    Path("raw.bin").write_bytes(pickle.dumps(Payload()))
    for file in ("evil.pt", "raw.bin"):
        with pytest.raises(ValueError, match="not run"):
            main([file, "mlip", "--model", config_file(tmp_path)])
    assert not Path("ran").exists() and not Path("mlip").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "lfs"])
def test_damaged_files_are_refused(tmp_path, state, suffix, damage):
    path = tmp_path / f"model{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    content = path.read_bytes()
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"<html>", "lfs": lfs}[damage])
    with pytest.raises(ValueError, match=r"fetch it|damaged") as refusal:
        main([str(path), str(tmp_path / "mlip"), "--model", config_file(tmp_path)])
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "mlip").exists()


def test_config_and_weights_that_contradict_each_other_are_named(tmp_path, state):
    def refusal(changed: dict, **vision) -> str:
        cfg = model_cfg_of("plain")
        cfg["vision_cfg"] |= vision
        (tmp_path / "model.json").write_text(json.dumps(cfg))
        torch.save(changed, tmp_path / "model.pt")
        with pytest.raises(ValueError) as error:
            convert_checkpoint(tmp_path / "model.pt", model=str(tmp_path / "model.json"))
        return str(error.value)

    both = refusal(state, image_size=64)
    assert "visual.positional_embedding is [17, 48]" in both and "[65, 48]" in both
    assert "visual.transformer.resblocks.3.attn.in_proj_weight" in refusal(state, layers=4)
    assert "visual.transformer.resblocks.2" in refusal(state, layers=2)
    assert "ls_1.gamma" in refusal(state, ls_init_value=0.1)
    assert "ln_pre" in refusal(state, no_ln_pre=True)
    assert "visual.attn_pool.query" in refusal({**state, "visual.attn_pool.query": torch.ones(1)})
    registers = refusal({**state, "visual.register_tokens": torch.ones(4, 48)})
    assert registers.startswith("visual.register_tokens is not a parameter of a supported tower; MLIP converts")
    assert "\n" not in registers
    assert "logit_bias" in refusal({**state, "logit_bias": torch.ones(1)})
    missing = {key: tensor for key, tensor in state.items() if key != "text_projection"}
    assert "text_projection" in refusal(missing)


def test_an_existing_target_is_kept(tmp_path):
    source, _ = clip_folder(tmp_path / "clip")
    for target in ("model", "notes"):
        (tmp_path / target).mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "notes" / "diary.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="set overwrite"):
        main([str(source), str(tmp_path / "model")])
    with pytest.raises(FileExistsError, match="not a model folder"):
        main([str(source), str(tmp_path / "notes"), "--overwrite"])
    main([str(source), str(tmp_path / "model"), "--overwrite"])
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert (tmp_path / "notes" / "diary.txt").read_text() == "dear"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip", "model", "notes"]


def test_a_source_can_be_overwritten_by_its_conversion(tmp_path):
    source, theirs = clip_folder(tmp_path / "clip")
    main([str(source), str(source), "--overwrite"])
    saved = load_file(source / "model.safetensors")
    assert all(torch.equal(tensor, saved[key]) for key, tensor in theirs.state_dict().items())


def test_a_full_disk_leaves_nothing_half_written_and_the_old_folder(tmp_path, monkeypatch):
    source, _ = clip_folder(tmp_path / "clip")
    shutil.copytree(source, tmp_path / "old")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    before = sorted(file.name for file in (tmp_path / "old").iterdir())
    for target in ("new", "old"):
        with pytest.raises(OSError, match=r"could not be written.*No space left"):
            monkeypatch.setattr("modeling_mlip.conversion.checkpoints.write_reports", full)
            main([str(source), str(tmp_path / target), "--overwrite"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip", "old"]
    assert sorted(file.name for file in (tmp_path / "old").iterdir()) == before


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a file, nor a folder, nor a Hub id"):
        convert_checkpoint(tmp_path / "absent")
    with pytest.raises(OSError, match="could not be fetched from the Hub"):
        convert_checkpoint("nobody/nothing-of-this-name")
    with pytest.raises(ValueError, match="neither a config nor exactly one checkpoint"):
        convert_checkpoint(tmp_path)
    source, _ = clip_folder(tmp_path / "clip")
    for file in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        (source / file).unlink()
    with pytest.raises(OSError, match="has no processor that loads"):
        convert_checkpoint(source)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        sources.read_source(tmp_path)


def test_a_hub_id_is_fetched_with_its_weights_alone(tmp_path, monkeypatch, expected):
    folder = open_clip_folder(tmp_path / "snapshot")
    asked = {}

    class Api:
        def list_repo_files(self, repo):
            return ["pytorch_model.bin", "config.json", *(file.name for file in folder.iterdir())]

    def snapshot(repo, allow_patterns):
        asked[repo] = allow_patterns
        return str(folder)

    monkeypatch.setattr(sources, "HfApi", Api)
    monkeypatch.setattr(sources, "snapshot_download", snapshot)
    model, _ = convert_checkpoint("hf-hub:someone/model")
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in expected.items())
    assert "open_clip_model.safetensors" in asked["someone/model"]
    assert "pytorch_model.bin" not in asked["someone/model"]

# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Saved folders load without the package, pushed folders arrive complete, and damaged folders are refused.

"Without the package" is a process that can import everything that is installed here except this package.
"""

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import TEXT, VISION, open_gate, small_config, small_model
from hub_server import OTHER_TOKEN, Hub, client_environment, running_hub, use_hub
from PIL import Image
from processes import CleanProcess, running_clean_process
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

import modeling_mlip
from modeling_mlip import MLIPConfig, MLIPModel, MLIPTextConfig, MLIPVisionConfig
from modeling_mlip.data.caption_tokenizer import train_tokenizer
from modeling_mlip.data.shapes import shapes_dataset
from modeling_mlip.hub import push as push_command
from modeling_mlip.hub import without_package
from modeling_mlip.hub.cli import main as mlip
from modeling_mlip.hub.loading import load_pretrained, load_saved
from modeling_mlip.hub.model_card import write_model_card
from modeling_mlip.hub.results import Result
from modeling_mlip.hub.verification import verify_folder

ROOT = Path(__file__).parents[2]
CLASSES = [
    getattr(modeling_mlip, name)
    for name in modeling_mlip.__all__
    if "Config" not in name and name != "MLIPPreTrainedModel"
]

# Loads every folder with the Auto classes, writes the outputs to a file, and saves the models again.
LOAD_AND_SAVE = """
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import save_file

sys.path.insert(0, {script_folder!r})
from without_package import collect_outputs, load_without_package

folders, seen, again = json.loads(sys.argv[1]), {{}}, sys.argv[2]
for name, folder in folders.items():
    if Path(folder).is_dir():
        model, processor = load_without_package(folder)
    else:  # a Hub id
        model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
        processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    seen |= {{f"{{name}} {{key}}": value for key, value in collect_outputs(model, processor).items()}}
    if again:
        model.save_pretrained(f"{{again}}/{{name}}")
    if name != "MLIPModel":
        continue
    assert transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "mlip"
    zero_shot = transformers.AutoModelForZeroShotImageClassification.from_pretrained(folder, trust_remote_code=True)
    assert all(torch.equal(a, b) for a, b in zip(zero_shot.parameters(), model.parameters(), strict=True))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert tokenizer("two dogs").input_ids == processor.tokenizer("two dogs").input_ids
    images = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    assert images.to_dict() == processor.image_processor.to_dict()
    if again:
        processor.save_pretrained(f"{{again}}/{{name}}")
save_file(seen, sys.argv[3])
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, str]:
    """A folder for each public class; `MLIPModel`'s has a processor and a model card too."""
    root = tmp_path_factory.mktemp("saved")
    tokenizer = train_tokenizer(["a photo of a cat", "two dogs"] * 9, max_seq_length=TEXT["max_position_embeddings"])
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    whole = open_gate(small_model(vision={"merge_ratio": 0.5}, text={**ids, "vocab_size": len(tokenizer)}))
    folders = {model_class.__name__: str(root / model_class.__name__) for model_class in CLASSES}
    for model_class in CLASSES:
        config = {MLIPTextConfig: whole.config.text_config, MLIPVisionConfig: whole.config.vision_config}
        model = whole if model_class is MLIPModel else model_class(config.get(model_class.config_class, whole.config))
        model.save_pretrained(folders[model_class.__name__])
    size = VISION["image_size"]
    images = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(root / "MLIPModel")
    write_model_card(
        root / "MLIPModel",
        results=[Result("retrieval", "recall", 1, 61.2, prefix="text_to_image")],
        config=whole.config,
        dataset="owner/pairs",
        base_model=None,
        training={"steps": 4},
        curves=None,
    )
    return folders


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """The folder of `MLIPModel`, to be damaged."""
    return Path(shutil.copytree(saved["MLIPModel"], tmp_path / "copy"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with running_hub(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture
def online(hub, tmp_path, monkeypatch) -> Hub:
    """The Hub, for calls in this process too."""
    use_hub(hub, monkeypatch, tmp_path / "cache")
    return hub


@pytest.fixture(scope="module")
def clean_process(hub, tmp_path_factory):
    with running_clean_process(tmp_path_factory.mktemp("clean"), client_environment(hub)) as process:
        yield process


def run_without_package(
    process: CleanProcess, folders: dict[str, str], cwd: Path, again: str = "", online: bool = False
) -> dict[str, torch.Tensor]:
    alone = cwd / "alone"  # beside it lie files that would be found first
    alone.mkdir(exist_ok=True)
    shutil.copy(without_package.__file__, alone)
    out = str(cwd / "seen.safetensors")
    process.run(LOAD_AND_SAVE.format(script_folder=str(alone)), [json.dumps(folders), again, out], cwd, online)
    return load_file(out)


def outputs_of(folder: str) -> dict[str, torch.Tensor]:
    has_processor = (Path(folder) / without_package.PROCESSOR_CONFIG).is_file()
    return without_package.collect_outputs(
        load_saved(folder), AutoProcessor.from_pretrained(folder) if has_processor else None
    )


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


# Without this package


def test_every_class_loads_bit_for_bit_without_the_package_and_after_a_second_save(saved, clean_process, tmp_path):
    expected = {f"{name} {key}": value for name, folder in saved.items() for key, value in outputs_of(folder).items()}
    assert len(saved) == 6 and sum("output" in name for name in expected) > 12
    first = run_without_package(clean_process, saved, tmp_path, again=str(tmp_path / "again"))
    assert_equal(first, expected)
    again = {name: str(tmp_path / "again" / name) for name in saved}
    assert_equal(run_without_package(clean_process, again, tmp_path), expected)
    for name, folder in again.items():
        for config in (json.load(open(f"{folder}/config.json")), json.load(open(f"{saved[name]}/config.json"))):
            assert not any("--" in reference for reference in config["auto_map"].values())
            assert set(config["auto_map"]) >= {"AutoConfig", "AutoModel"}
    # and here, without the flag
    assert_equal({f"MLIPModel {key}": value for key, value in outputs_of(again["MLIPModel"]).items()},
                 {name: value for name, value in expected.items() if name.startswith("MLIPModel ")})  # fmt: skip


@pytest.mark.parametrize("model_class", CLASSES)
def test_auto_classes_load_the_same_class_with_and_without_the_package(model_class, saved):
    config = json.load(open(f"{saved[model_class.__name__]}/config.json"))
    for name, reference in config["auto_map"].items():
        made = getattr(transformers, name).from_pretrained(saved[model_class.__name__])
        assert f"{type(made).__module__.split('.')[-1]}.{type(made).__name__}" == reference


# Over HTTP


def test_push_to_hub_of_model_and_processor_and_back_by_its_id(saved, online, clean_process, tmp_path):
    MLIPModel.from_pretrained(saved["MLIPModel"]).push_to_hub("ada/pushed")
    AutoProcessor.from_pretrained(saved["MLIPModel"]).push_to_hub("ada/pushed", private=True)
    assert ("PUT", f"lfs/{online.tree('ada/pushed')['model.safetensors'].resolve().name}") in online.requests
    again = str(tmp_path / "again")
    loaded = run_without_package(clean_process, {"MLIPModel": "ada/pushed"}, tmp_path, again, online=True)
    expected = {f"MLIPModel {key}": value for key, value in outputs_of(saved["MLIPModel"]).items()}
    assert_equal(loaded, expected)
    assert ("GET", "ada/pushed/resolve/" + online.info("ada/pushed")["sha"] + "/modeling_mlip.py") in online.requests
    # The second save stands alone: no reference back to the Hub, and all the code.
    config = json.load(open(tmp_path / "again" / "MLIPModel" / "config.json"))
    assert not any("--" in reference for reference in config["auto_map"].values())
    assert_equal(run_without_package(clean_process, {"MLIPModel": f"{again}/MLIPModel"}, tmp_path), expected)


def test_mlip_push_uploads_the_folder_without_pickles(copy, online, monkeypatch, capsys):
    (copy / "checkpoint-2").mkdir()
    for name in ("checkpoint-2/optimizer.pt", "training_args.bin"):
        (copy / name).write_bytes(b"a pickle")
    command = ["push", str(copy), "ada/mine", "--space", "--space_requirement", "modeling-mlip[app]"]
    assert mlip([*command, "--private", "--commit_message", "First"]) == 0
    printed = capsys.readouterr().out
    assert "equal to the bit" in printed and f"Pushed to {online.url}/ada/mine" in printed
    assert f"The Space is {online.url}/spaces/ada/mine" in printed and online.info("spaces/ada/mine")["private"]
    sent = {name: path.read_bytes() for name, path in online.tree("ada/mine").items()}
    assert sent == {
        path.name: path.read_bytes() for path in copy.iterdir() if path.is_file() and "bin" not in path.name
    }
    assert online.info("ada/mine")["private"] and online.info("ada/mine")["message"] == "First"
    before = len(online.requests)
    monkeypatch.setattr(push_command, "verify_folder", lambda folder: f"{folder} is verified.")
    assert mlip([*command, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert f"{copy} is verified." in printed and "Nothing was pushed" in printed
    assert len(online.requests) == before


def test_an_interrupted_upload_goes_on_and_refusals_say_why(saved, online, tmp_path, monkeypatch):
    folder = tmp_path / "sharded"
    load_saved(saved["MLIPModel"]).save_pretrained(folder, max_shard_size="60KB")
    shards = list(folder.glob("*.safetensors"))
    assert len(shards) > 3 and all(path.stat().st_size > 10_000 for path in shards)

    def refusal(repo: str, private: bool = False) -> str:
        with pytest.raises((OSError, ValueError)) as refused:
            push_command.push(str(folder), repo, private)
        return str(refused.value)

    online.uploads_until_failure = 2
    failed = refusal("ada/large")
    assert failed.startswith("ada/large") and "507" in failed and "not sent twice" in failed
    assert push_command.push(str(folder), "ada/large") == f"{online.url}/ada/large"
    assert "is public" in refusal("ada/large", private=True)
    forbidden = refusal("bob/large")
    assert "403" in forbidden and "bob/large" in forbidden and "hf auth login" in forbidden
    monkeypatch.setenv("HF_TOKEN", OTHER_TOKEN)
    assert "403" in refusal("ada/large")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    unknown = refusal("ada/large")
    assert "401" in unknown and "hf auth login" in unknown
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    unreachable = refusal("ada/large")
    assert "127.0.0.1:9" in unreachable and "refused" in unreachable
    # Every shard arrived, and but for the one that failed each large file was sent once.
    sent = [path for method, path in online.requests if method == "PUT"]
    oids = [online.tree("ada/large")[path.name].resolve().name for path in shards]
    assert {f"lfs/{oid}" for oid in oids} <= set(sent), sent
    assert len(sent) == len(set(sent)) + 1, sent


def test_training_pushes_its_own_card_and_code_with_every_commit(online, clean_process, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("modeling_mlip.data.sources.shapes_dataset", lambda: shapes_dataset(32, 16))
    data = "--dataset_name shapes --max_train_samples 32 --max_eval_samples 16"
    model = "--config_name tiny --hidden_size 48 --num_hidden_layers 2 --num_attention_heads 3 --patch_size 16"
    steps = "--merge_ratio 0.5 --max_steps 4 --save_steps 2 --per_device_train_batch_size 16 --use_cpu"
    pushing = "--push_to_hub --hub_always_push --output_dir run --hub_model_id"
    command = ["train", *f"{data} {model} {steps} {pushing}".split()]
    assert mlip([*command, "ada/trained"]) == 0
    tree = online.tree("ada/trained")
    for name in ("README.md", "model.safetensors", "config.json", "modeling_mlip.py", "tokenizer.json"):
        assert tree[name].read_bytes() == (tmp_path / "run" / name).read_bytes(), name
    assert "This model is a fine-tuned version" not in tree["README.md"].read_text()  # Trainer's draft
    assert "recall@1" in tree["README.md"].read_text() and "merge_ratios.png" in tree
    commits = [path for path in online.repo("ada/trained").iterdir() if (path / "model.safetensors").exists()]
    assert len(commits) > 1
    for commit in commits:
        assert {path.name for path in commit.glob("*.py")} == {path.name for path in (tmp_path / "run").glob("*.py")}
    # What the card tells its readers to run does run, where this package is absent.
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "picture.png")
    blocks = re.findall(r"```python\n(.*?)```", tree["README.md"].read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    code = "".join(blocks).replace("path/to/run", "ada/trained")  # the reader's place of the model
    code += "\nprint(probabilities.shape, model.config.merge_ratio)"
    assert "torch.Size([1, 2]) 0.5" in clean_process.run(code, [], tmp_path, online=True)
    # Refused before the first step
    shutil.rmtree(tmp_path / "run")
    capfd.readouterr()
    assert mlip([*command, "bob/trained"]) == 1
    assert error_of(capfd, "train").startswith("mlip train: error: --push_to_hub: 403")
    assert not (tmp_path / "run" / "config.json").exists()


# Verification


def test_verification_detects_code_files_that_compute_something_else(copy):
    code = copy / "modeling_mlip.py"
    changed = code.read_text().replace("self.gate * self.output_projection", "2 * self.gate * self.output_projection")
    assert changed != code.read_text()
    code.write_text(changed)
    with pytest.raises(ValueError, match="gives another result .* output"):
        verify_folder(str(copy))


def test_verification_detects_a_missing_code_file(copy):
    (copy / "token_merging.py").unlink()
    with pytest.raises(ValueError, match="does not load .*token_merging"):
        verify_folder(str(copy))


def damage_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def damage_config(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


DAMAGES = {
    "no config": (lambda path: (path / "config.json").unlink(), "holds no config.json"),
    "no JSON": (lambda path: truncate(path / "config.json"), "not a valid JSON"),
    "another model": (lambda path: damage_config(path, lambda c: c.update(model_type="bert")), "of type 'bert'"),
    "no model type": (lambda path: damage_config(path, lambda c: c.pop("model_type")), "of type None"),
    "unknown merge method": (
        lambda path: damage_config(path, lambda c: c["vision_config"].update(merge_method="magic")),
        "merge_method='magic' is unknown; choose one of 'mlip', 'tome', 'elip'",
    ),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "no file named model.safetensors"),
    "weights cut off": (lambda path: truncate(path / "model.safetensors"), "cannot be read"),
    "missing weight": (
        lambda path: damage_weights(path, lambda w: w.pop("vision_model.frequency.gate")),
        "missing weights: vision_model.frequency.gate",
    ),
    "weight of CLIP missing": (
        lambda path: damage_weights(path, lambda w: w.pop("visual_projection.weight")),
        "missing weights: visual_projection.weight",
    ),
    "unexpected weight": (
        lambda path: damage_weights(path, lambda w: w.update(head=torch.zeros(2))),
        "does not know: head",
    ),
    "another shape": (
        lambda path: damage_weights(path, lambda w: w.update({"text_projection.weight": torch.zeros(3, 2)})),
        "text_projection.weight [3, 2] for [24, 32]",
    ),
}  # fmt: skip


def error_of(capfd, command: str) -> str:
    error = capfd.readouterr().err
    assert "Traceback" not in error
    [line] = [line for line in error.splitlines() if line.startswith(f"mlip {command}: error: ")]
    assert error.rstrip().endswith(line)
    return line


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("pairs") / "pairs.parquet")
    shapes_dataset(num_train=8, num_validation=2)["train"].to_parquet(path)
    return path


@pytest.mark.parametrize("case", DAMAGES)
def test_every_command_refuses_a_damaged_folder_in_one_line(case, copy, pairs, capfd):
    damage, message = DAMAGES[case]
    damage(copy)
    for command in ("push", "evaluate", "train"):
        flags = ["--model_name_or_path", str(copy), "--train_file", pairs]
        flags += ["--output_dir", str(copy.parent / "out")] if command == "train" else []
        assert mlip([command, *([str(copy), "ada/name", "--dry_run"] if command == "push" else flags)]) == 1
        assert message in error_of(capfd, command), command
    assert not (copy.parent / "out").exists()


def test_pickles_are_not_pushed(copy, capfd):
    (copy / "extra").mkdir()
    torch.save({}, copy / "extra" / "pytorch_model.bin")
    assert mlip(["push", str(copy), "ada/name", "--dry_run"]) == 1
    assert "extra/pytorch_model.bin is a pickle" in error_of(capfd, "push")


def test_a_clip_folder_may_lack_only_the_weights_that_mlip_adds(tmp_path):
    CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=24)).save_pretrained(tmp_path)
    config = MLIPConfig.from_pretrained(str(tmp_path), token_loss_weight=0.1)
    model = load_pretrained(str(tmp_path), config=config)
    assert torch.equal(model.token_visual_projection.weight, model.visual_projection.weight)
    with pytest.raises(ValueError, match="of type 'clip'"):
        load_saved(tmp_path)
    damage_weights(tmp_path, lambda weights: weights.pop("logit_scale"))
    with pytest.raises(ValueError, match="missing weights: logit_scale"):
        load_pretrained(str(tmp_path))


def test_an_override_may_add_or_leave_out_parts(saved, tmp_path):
    small_model(token_loss_weight=0).save_pretrained(tmp_path)
    assert load_pretrained(str(tmp_path), config=small_config()).token_visual_projection is not None
    config = MLIPConfig.from_pretrained(saved["MLIPModel"], token_loss_weight=0)
    assert load_pretrained(saved["MLIPModel"], config=config).token_visual_projection is None


@pytest.mark.parametrize("version", ["4.57.1", "5.16.9", "6.0.0"])
def test_a_transformers_out_of_range_is_named_with_the_range_of_setup_cfg(version, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(ImportError, match=f">=5.21, <6, and {version} is installed"):
        runpy.run_path(str(ROOT / "modeling_mlip" / "configuration_mlip.py"))
    assert "transformers >=5.21, <6\n" in (ROOT / "setup.cfg").read_text()

# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Parity, seconds and memory of conversion for all configurations of open_clip that MLIP supports.

    python benchmarks/conversion.py              # all; what is measured already is kept
    python benchmarks/conversion.py --only ViT-B-32
    python benchmarks/conversion.py --only ViT-g-14 --full

Each configuration gets random weights (norms, biases and LayerScale too), is written as an OpenCLIP folder, converted
as `mlip convert` does it and compared with open_clip, each step in a process of its own. The models of `LARGE` are
converted on the meta device, which checks names and shapes both ways but no values, unless `--full` is given. At the
end the command prints for how many of open_clip's pretrained tags the configuration is supported.
Tokenizers that would have to be downloaded are replaced by stand-ins with the same special ids. "memory" is the peak
resident set of the converting process over that after its imports, in units of the checkpoint; mapped files count.
"""

import argparse
import functools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results" / "conversion.json"
# Names of models of more than 1.1 billion parameters begin so.
LARGE = (
    "ViT-g-",
    "ViT-bigG-",
    "ViT-e-",
    "ViT-gopt-",
    "ViT-SO400M-14-SigLIP2",
    "ViT-SO400M-16-",
    "xlm-roberta-large-",
    "nllb-clip-large",
    "EVA01-g-",
    "EVA02-E-",
    "PE-Core-bigG-",
)
# Special ids of the tokenizers that OpenCLIP names.
SPECIAL = {
    "bert-base-uncased": {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102},
    "google/mt5-base": {"<pad>": 0, "</s>": 1, "<unk>": 2},
    "facebook/xlm-v-base": {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3},
}
ROBERTA_SPECIAL = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
SIGLIP_SPECIAL = {"<pad>": 0, "</s>": 1, "<unk>": 2}
ROLES = {
    "[PAD]": "pad_token", "[UNK]": "unk_token", "[CLS]": "cls_token", "[SEP]": "sep_token",
    "<pad>": "pad_token", "<unk>": "unk_token", "<s>": "bos_token", "</s>": "eos_token",
}  # fmt: skip


def names() -> list[str]:
    """open_clip's configurations that MLIP supports."""
    import open_clip

    return [name for name in open_clip.list_models() if is_supported(name)]


@functools.cache
def is_supported(name: str) -> bool:
    """Whether the configuration of a model of open_clip converts."""
    import open_clip

    from modeling_mlip.conversion.open_clip_configurations import mlip_config_of_open_clip

    try:
        mlip_config_of_open_clip(open_clip.get_model_config(name))
    except ValueError:
        return False
    return True


def count_supported_tags() -> tuple[int, int]:
    """The number of open_clip's pretrained tags with a supported configuration, and the number of all tags."""
    import open_clip

    models = [model for model, _ in open_clip.list_pretrained()]
    supported = {model for model in set(models) if is_supported(model)}
    return sum(model in supported for model in models), len(models)


def original(model_cfg: dict) -> torch.nn.Module:
    """open_clip's model on the meta device."""
    from modeling_mlip.conversion.parity import open_clip_model_on_meta

    return open_clip_model_on_meta(model_cfg)


def write_random_checkpoint(name: str, folder: Path) -> None:
    """An OpenCLIP folder with random weights."""
    import open_clip
    from safetensors.torch import save_file

    model_cfg = open_clip.get_model_config(name)
    shapes = original(model_cfg).state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {key: random_tensor(key, tensor.shape, generator) for key, tensor in shapes.items()}
    save_file(state, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
    if tokenizer := model_cfg["text_cfg"].get("hf_tokenizer_name"):
        others = ROBERTA_SPECIAL if "hf_model_name" in model_cfg["text_cfg"] else SIGLIP_SPECIAL
        stand_in_tokenizer(SPECIAL.get(tokenizer, others)).save_pretrained(folder)


def random_tensor(key: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Values of the size that training leaves, so that every parameter counts in the outcome."""
    if key == "logit_scale":
        return torch.tensor(100.0).log()
    if key == "logit_bias":
        return torch.tensor(-10.0)
    if key.endswith("num_batches_tracked"):
        return torch.tensor(1)
    noise = torch.randn(shape, generator=generator)
    if len(shape) < 2:
        is_norm = any(part in key for part in ("ln_", "norm", "bn.")) and key.endswith(("weight", "running_var"))
        return (1.0 if is_norm else 0.3 if key.endswith("gamma") else 0.0) + 0.1 * noise
    if "embedding" in key or key.endswith("pos_embed"):
        return 0.1 * noise
    if key.endswith("latent"):
        return noise
    fan_in = shape[0] if key in ("visual.proj", "text_projection") else shape[1:].numel()
    return fan_in**-0.5 * noise


def stand_in_tokenizer(special: dict[str, int]):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    free = (number for number in range(1000) if number not in special.values())
    vocab = special | dict(zip("abcdefghijklmnopqrstuvwxyz", free, strict=False))
    unknown = next(token for token in special if ROLES[token] == "unk_token")
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{ROLES[token]: token for token in special})


def measure_conversion(folder: Path) -> dict:
    """Convert and write as `mlip convert` does."""
    import open_clip  # noqa: F401  its import is not part of what is measured

    from modeling_mlip.conversion.checkpoints import convert, write_mlip
    from modeling_mlip.hub.atomic_files import new_folder

    before, began = _peak_bytes(), time.perf_counter()
    conversion = convert(folder)
    with new_folder(folder / "mlip", overwrite=False) as target:
        write_mlip(conversion, target)
    seconds, peak = time.perf_counter() - began, _peak_bytes()
    size = conversion.source.num_bytes
    differences = conversion.report.differences()
    parity = {key: differences[key] for key in ("image embeddings", "text embeddings", "logits")}
    worst = conversion.report.worst
    return {"parity": parity, "worst": worst, "seconds": seconds, "peak_bytes": peak, "checkpoint_bytes": size,
            "memory": (peak - before) / size}  # fmt: skip


def measure_on_meta(name: str) -> dict:
    """Names and shapes, there and back."""
    import open_clip

    from modeling_mlip import MLIPConfig, MLIPModel
    from modeling_mlip.conversion import open_clip_configurations as configs
    from modeling_mlip.conversion import tables

    began = time.perf_counter()
    model_cfg = open_clip.get_model_config(name)
    theirs = {key.removeprefix("text."): tensor for key, tensor in original(model_cfg).state_dict().items()}
    config = MLIPConfig(**configs.mlip_config_of_open_clip(model_cfg))
    table = tables.open_clip_table(config)
    with torch.device("meta"):
        model = MLIPModel(config).state_dict()
    shapes = {key: tensor.shape for key, tensor in model.items() if not tables.is_own(key)}
    back = tables.from_mlip(tables.to_mlip(theirs, table, shapes), table)
    if {key: tensor.shape for key, tensor in back.items()} != {key: tensor.shape for key, tensor in theirs.items()}:
        raise ValueError(f"{name} does not come back with the same names and shapes.")
    size = sum(tensor.nbytes for tensor in theirs.values())
    return {"meta": True, "seconds": time.perf_counter() - began, "checkpoint_bytes": size}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _step(*arguments: str) -> str:
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def check_configuration(name: str, full: bool) -> dict:
    if name.startswith(LARGE) and not full:
        return json.loads(_step("--meta", name))
    with tempfile.TemporaryDirectory() as folder:
        _step("--make", name, folder)
        return json.loads(_step("--measure", folder))


def format_row(name: str, result: dict) -> str:
    gigabytes = f"{result['checkpoint_bytes'] / 1e9:6.2f}"
    if "error" in result:
        return f"{name:<30} {result['error']}"
    if result.get("meta"):
        return f"{name:<30} {gigabytes}   names and shapes agree {result['seconds']:21.1f}"
    parity = result["parity"]
    return (
        f"{name:<30} {gigabytes} {parity['image embeddings']:10.1e} {parity['text embeddings']:10.1e} "
        f"{parity['logits']:10.1e} {result['seconds']:8.1f} {result['peak_bytes'] / 1e9:8.2f} {result['memory']:7.2f}"
    )


def read_results() -> dict[str, dict]:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def is_measured(name: str, results: dict[str, dict], full: bool) -> bool:
    """Whether a result is there, and with `full` one in values."""
    result = results.get(name, {"error": "not measured"})
    return "error" not in result and not (full and result.get("meta"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these configurations, measured anew")
    parser.add_argument("--full", action="store_true", help="compare the values of all models")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--meta", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    if arguments.make:
        return write_random_checkpoint(arguments.make[0], Path(arguments.make[1]))
    if arguments.measure or arguments.meta:
        result = measure_conversion(Path(arguments.measure)) if arguments.measure else measure_on_meta(arguments.meta)
        return print(json.dumps(result))

    if unknown := [name for name in arguments.only or () if name not in names()]:
        parser.error(f"{unknown[0]} is not a configuration of open_clip that MLIP supports")

    results = read_results()
    heads = f"{'image':>10} {'text':>10} {'logits':>10} {'seconds':>8} {'peak GB':>8} {'memory':>7}"
    print(f"{'configuration':<30} {'GB':>6} {heads}")
    wanted = arguments.only or names()
    for name in wanted:
        if arguments.only or not is_measured(name, results, arguments.full):
            try:
                result = check_configuration(name, arguments.full)
            except RuntimeError as error:
                result = {"error": str(error), "checkpoint_bytes": 0}
            results = read_results() | {name: result}  # another process may have written since
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(format_row(name, results[name]), flush=True)
    good = [name for name in wanted if results[name].get("meta") or results[name].get("worst", 1) <= 1e-4]
    full = [name for name in good if not results[name].get("meta")]
    print(f"{len(good)} of {len(wanted)} agree, {len(full)} of them in values (largest difference allowed: 1e-4)")
    supported, listed = count_supported_tags()
    print(f"{supported} of {listed} pretrained tags of open_clip are supported ({supported / listed:.0%})")
    return None


if __name__ == "__main__":
    main()

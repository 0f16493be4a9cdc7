"""Merging and folding of diffusion pipelines: folders of components, written without diffusers."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adamerge_jax import Coefficients, load_recipe
from adamerge_jax.checkpoints.opening import open_checkpoint
from adamerge_jax.cli import main as cli
from adamerge_jax.pipeline.account import account
from adamerge_jax.pipeline.initial_merge import merged_names
from adamerge_jax.pipeline.models import open_models
from tests.references import LAMBDA, merge_by_task_arithmetic, require_sum, write_recipe

Tensors = dict[str, np.ndarray]

INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.42.1",
    "force_zeros_for_empty_prompt": True,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

CONFIGS: dict[str, dict[str, Any]] = {
    "text_encoder": {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"},
    "unet": {"_class_name": "UNet2DConditionModel", "sample_size": 64},
    "vae": {"_class_name": "AutoencoderKL"},
}


def made_components(seed: int) -> dict[str, Tensors]:
    """Returns random tensors of a U-Net, a VAE and a text encoder in half precision."""
    draws = np.random.default_rng(seed)
    unet = {"conv_in.weight": (8, 4, 3, 3), "conv_in.bias": (8,)}
    text = {"text_model.embeddings.token_embedding.weight": (32, 16)}
    vae = {"encoder.conv_in.weight": (4, 3, 3, 3)}
    for block in range(2):
        vae[f"decoder.up_blocks.{block}.weight"] = (400, 400)  # two make more than a file of 1 MB
        unet[f"down_blocks.{block}.resnets.0.conv1.weight"] = (8 * (block + 1), 8, 3, 3)
        unet[f"down_blocks.{block}.attentions.0.to_q.weight"] = (16, 16)
        text[f"text_model.encoder.layers.{block}.mlp.fc1.weight"] = (32, 16)

    def made(shapes: Mapping[str, tuple[int, ...]], dtype: Any) -> Tensors:
        return {name: draws.standard_normal(s).astype(dtype) for name, s in shapes.items()}

    return {
        "unet": made(unet, ml_dtypes.bfloat16),
        "vae": made(vae, np.float32),
        "text_encoder": made(text, np.float16)
        | {"text_model.embeddings.position_ids": np.arange(7)[None]},
    }


def changed(base: Mapping[str, Tensors], seed: int) -> dict[str, Tensors]:
    """Returns a fine-tune of all components but the VAE."""
    drawn = made_components(seed)
    return {
        part: {
            name: array
            if part == "vae" or array.dtype == np.int64
            else (array + array.dtype.type(0.1) * drawn[part][name]).astype(array.dtype)
            for name, array in tensors.items()
        }
        for part, tensors in base.items()
    }


def write_pipeline(
    folder: Path, components: Mapping[str, Tensors], prediction: str = "epsilon"
) -> None:
    """Writes a pipeline: the U-Net in two files, the text encoder as a variant."""
    index = {name: [None, None] if name in CONFIGS else INDEX[name] for name in INDEX}
    for name, tensors in components.items():
        part = folder / name
        part.mkdir(parents=True)
        index[name] = INDEX.get(name, ["diffusers", "Other"])
        (part / "config.json").write_text(json.dumps(CONFIGS.get(name, {"_class_name": "Other"})))
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        files = {f"{stem}.fp16.safetensors" if stem == "model" else f"{stem}.safetensors": tensors}
        if name == "unet":
            names = list(tensors)
            shards = [names[:2], names[2:]]
            files = {
                f"{stem}-0000{number}-of-00002.safetensors": {n: tensors[n] for n in shard}
                for number, shard in enumerate(shards, 1)
            }
            weight_map = {n: file for file, shard in files.items() for n in shard}
            (part / f"{stem}.safetensors.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": weight_map})
            )
        for file, content in files.items():
            save_file(content, part / file, metadata={"format": "pt"})
    for name, file, fields in (
        ("scheduler", "scheduler_config.json", {"prediction_type": prediction}),
        ("tokenizer", "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer"}),
    ):
        (folder / name).mkdir()
        (folder / name / file).write_text(json.dumps(fields))
    (folder / "tokenizer" / "own.py").write_text("raise SystemExit('run')")
    (folder / "model_index.json").write_text(json.dumps(index))


def read_pipeline(folder: Path) -> dict[str, Tensors]:
    return {
        part: {
            name: array
            for file in sorted((folder / part).glob("*.safetensors"))
            for name, array in load_file(file).items()
        }
        for part in CONFIGS
    }


def run(*arguments: str | Path) -> None:
    cli.main([str(argument) for argument in arguments])


def recipe_of(folder: Path, *tasks: str) -> Path:
    experts = {task: {"expert": task} for task in tasks}
    export = {"orbax": False, "shard_megabytes": 1}
    return write_recipe(folder, {"base": "base", "tasks": experts, "export": export})


def require_sums(
    merged: Mapping[str, Tensors],
    base: Mapping[str, Tensors],
    experts: Mapping[str, Mapping[str, Tensors]],
    weights: Mapping[str, Mapping[str, float]],
) -> None:
    """Compares a merge with one in float64, by the weight of each component and expert."""
    for part, tensors in base.items():
        assert merged[part].keys() == tensors.keys()
        for name, start in tensors.items():
            result = merged[part][name]
            assert result.dtype == start.dtype
            if start.dtype == np.int64:
                assert np.array_equal(result, start)
                continue
            rounding = {np.float32: 1e-6, np.float16: 1e-3}.get(start.dtype.type, 8e-3)
            tensors = [expert[part][name] for expert in experts.values()]
            scales = [weights[part][task] for task in experts]
            require_sum(result, start, tensors, scales, rtol=rounding, atol=1e-6, name=name)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory) -> Path:
    """Returns a folder with a base and two experts."""
    folder = tmp_path_factory.mktemp("pipelines")
    base = made_components(0)
    write_pipeline(folder / "base", base)
    for seed, task in enumerate(("anime", "photo"), 1):
        write_pipeline(folder / task, changed(base, seed))
    return folder


@pytest.fixture(scope="module")
def opened(pipelines) -> dict[str, dict[str, Tensors]]:
    return {name: read_pipeline(pipelines / name) for name in ("base", "anime", "photo")}


def test_components_are_merged_and_the_rest_is_copied(pipelines, opened, tmp_path, capsys):
    recipe = recipe_of(pipelines, "anime", "photo")
    merged = merge_by_task_arithmetic(recipe, tmp_path / "out")
    base, *_ = opened.values()
    experts = {task: opened[task] for task in ("anime", "photo")}
    weights = {part: dict.fromkeys(experts, LAMBDA) for part in CONFIGS}
    require_sums(read_pipeline(merged), base, experts, weights)

    index = json.loads((merged / "model_index.json").read_text())
    assert index == json.loads((pipelines / "base" / "model_index.json").read_text())
    assert json.loads((merged / "unet" / "config.json").read_text()) == CONFIGS["unet"]
    assert json.loads((merged / "text_encoder" / "config.json").read_text()) == {
        **CONFIGS["text_encoder"],
        "torch_dtype": "float16",
    }
    assert sorted(str(file.relative_to(merged)) for file in merged.rglob("*.*")) == [
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
        "vae/diffusion_pytorch_model-00002-of-00002.safetensors",
        "vae/diffusion_pytorch_model.safetensors.index.json",
    ]
    printed, card = capsys.readouterr().out, (merged / "README.md").read_text()
    for line in (
        "unet: 6 of 6 tensors merged",
        "vae: the base's weights in 'anime', 'photo'",
        "text_encoder: 3 of 4 tensors merged",
        "copied from the base: scheduler, tokenizer",
    ):
        assert line in printed
        assert line in card
    assert 'DiffusionPipeline.from_pretrained("PATH")' in card

    # The file of the method makes the same merge again, in the order of tasks that it has.
    again = tmp_path / "again"
    run("fold", recipe, tmp_path / "out" / "coefficients.safetensors", "--out", again)
    for file in merged.rglob("*.safetensors"):
        assert (again / "checkpoint" / file.relative_to(merged)).read_bytes() == file.read_bytes()


def test_the_account_says_a_note_once(pipelines):
    models = open_models(load_recipe(recipe_of(pipelines, "anime")), pipelines, to_run=False)
    note = "unet: 2 tensors are restored"
    checkpoint = dataclasses.replace(models.base.checkpoint, notes=(note,))
    base = dataclasses.replace(models.base, checkpoint=checkpoint)
    lines = account(dataclasses.replace(models, base=base), models.base.names)
    assert [line for line in lines if note in line] == [f"base: {note}"]


def test_each_component_may_have_its_own_coefficients(pipelines, opened, tmp_path):
    recipe = recipe_of(pipelines, "anime", "photo")
    models = open_models(load_recipe(recipe), pipelines, to_run=False)
    base, *experts = models.sources
    weights = {"unet": [0.7, 0.2], "vae": [0.0, 0.0], "text_encoder": [0.0, 1.0]}
    Coefficients(
        values={part: np.array(values, np.float32) for part, values in weights.items()},
        granularity="groups",
        granularity_options={"patterns": {part: [f"{part}.*"] for part in weights}},
        interference=(),
        constraint="free",
        shapes={name: models.base.shape(name) for name in merged_names(models)},
        base=base,
        experts=tuple(experts),
        objective="by hand",
        seed=0,
        step=0,
    ).save(tmp_path / "by_hand.safetensors")
    run("fold", recipe, tmp_path / "by_hand.safetensors", "--out", tmp_path / "out")
    tasks = ("anime", "photo")
    require_sums(
        read_pipeline(tmp_path / "out" / "checkpoint"),
        opened["base"],
        {task: opened[task] for task in tasks},
        {part: dict(zip(tasks, values, strict=True)) for part, values in weights.items()},
    )


@pytest.mark.parametrize(
    ("shard", "index"),
    [
        ("model.fp16-0000{}-of-00002.safetensors", "model.safetensors.index.fp16.json"),
        ("model-0000{}-of-00002.fp16.safetensors", "model.safetensors.fp16.index.json"),
    ],
)
def test_variants_in_several_files(pipelines, opened, tmp_path, shard, index):
    stem = "diffusion_pytorch_"
    shutil.copytree(pipelines / "base", tmp_path / "base")
    unet = tmp_path / "base" / "unet"
    plain_index = unet / f"{stem}model.safetensors.index.json"
    text = plain_index.read_text()
    for number in (1, 2):
        plain, name = f"{stem}model-0000{number}-of-00002.safetensors", stem + shard.format(number)
        (unet / plain).rename(unet / name)
        text = text.replace(plain, name)
    plain_index.unlink()
    (unet / (stem + index)).write_text(text)
    checkpoint = open_checkpoint(str(tmp_path / "base"))
    for name, array in opened["base"]["unet"].items():
        assert np.array_equal(checkpoint.read(f"unet.{name}"), array)
    # Files without a variant count where there are both.
    other = {name: -array for name, array in opened["base"]["unet"].items()}
    save_file(other, unet / f"{stem}model.safetensors")
    checkpoint = open_checkpoint(str(tmp_path / "base"))
    assert np.array_equal(checkpoint.read("unet.conv_in.bias"), other["conv_in.bias"])


def test_components_that_only_some_have(pipelines, opened, tmp_path, capsys):
    anime = dict(opened["anime"])
    del anime["text_encoder"]
    anime["image_encoder"] = {"proj.weight": np.ones((2, 2), np.float32)}
    write_pipeline(tmp_path / "anime", anime, prediction="v_prediction")
    for name in ("base", "photo"):
        (tmp_path / name).symlink_to(pipelines / name)
    recipe = recipe_of(tmp_path, "anime", "photo")
    run("merge", recipe, "--method", "average", "--out", tmp_path / "out")
    merged = read_pipeline(tmp_path / "out" / "checkpoint")
    for name, array in opened["base"]["text_encoder"].items():
        assert np.array_equal(merged["text_encoder"][name], array)
    assert not (tmp_path / "out" / "checkpoint" / "image_encoder").exists()
    said = capsys.readouterr()
    assert "text_encoder: as in the base, expert 'anime' lacks them: 3" in said.out
    assert "left out, expert 'anime' alone has them: image_encoder" in said.out
    assert "scheduler_config.json has another prediction_type than the base's" in said.err


def test_names_of_other_versions(pipelines, opened, tmp_path):
    """Text encoders without a prefix, and attention of autoencoders as it was called before."""
    (tmp_path / "base").symlink_to(pipelines / "base")
    anime = dict(opened["anime"])
    anime["text_encoder"] = {
        name.removeprefix("text_model."): array for name, array in anime["text_encoder"].items()
    }
    anime["unet"] = {
        name.replace(".to_q.", ".query."): array for name, array in anime["unet"].items()
    }
    write_pipeline(tmp_path / "anime", anime)
    weights = {part: {"anime": LAMBDA} for part in CONFIGS}
    checkpoint = merge_by_task_arithmetic(recipe_of(tmp_path, "anime"), tmp_path / "out")
    merged, base = read_pipeline(checkpoint), opened["base"]
    require_sums(merged, base, {"anime": opened["anime"]}, weights)

    # The other way round the merge has the names that its base has.
    fields = {"base": "anime", "tasks": {"anime": {"expert": str(pipelines / "anime")}}}
    recipe = write_recipe(tmp_path, fields | {"export": {"orbax": False}})
    run("merge", recipe, "--method", "average", "--out", tmp_path / "again")
    again = read_pipeline(tmp_path / "again" / "checkpoint")
    for part, tensors in anime.items():
        assert again[part].keys() == tensors.keys()


def test_single_components(pipelines, opened, tmp_path, capsys):
    """Among themselves, and as an expert in the place of the base's one of their class."""
    for name in ("base", "anime", "photo"):
        (tmp_path / name).symlink_to(pipelines / name)
        (tmp_path / f"{name}-unet").symlink_to(pipelines / name / "unet")
    recipe = recipe_of(tmp_path, "anime-unet", "photo-unet")
    fields = recipe.read_text()
    recipe.write_text(fields.replace("base: base", "base: base-unet"))
    merged = merge_by_task_arithmetic(recipe, tmp_path / "out")
    assert sorted(file.name for file in merged.iterdir()) == [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert "from diffusers import AutoModel" in (merged / "README.md").read_text()
    unet = {"unet": load_file(merged / "diffusion_pytorch_model.safetensors")}
    experts = {task: opened[task] for task in ("anime", "photo")}
    weights = {part: dict.fromkeys(experts, LAMBDA) for part in CONFIGS}
    require_sums(unet, {"unet": opened["base"]["unet"]}, experts, weights)

    recipe = recipe_of(tmp_path, "anime-unet")
    placed = read_pipeline(merge_by_task_arithmetic(recipe, tmp_path / "place"))
    anime = {"anime": opened["anime"]}
    require_sums({"unet": placed["unet"]}, {"unet": opened["base"]["unet"]}, anime, weights)
    assert "vae: as in the base, expert 'anime-unet' lacks them: 3" in capsys.readouterr().out


def test_pipelines_that_are_refused(pipelines, tmp_path, capsys):
    def refused(*messages: str, command: str = "merge") -> None:
        recipe = recipe_of(tmp_path, "anime")
        arguments = ["--method", "average"] if command == "merge" else []
        with pytest.raises(SystemExit) as caught:
            run(command, recipe, *arguments, "--out", tmp_path / "out")
        assert caught.value.code == 2
        error = capsys.readouterr().err
        for message in messages:
            assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()

    def restore(name: str) -> Path:
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        shutil.copytree(pipelines / name, tmp_path / name)
        return tmp_path / name

    base, expert = restore("base"), restore("anime")
    index = json.loads((base / "model_index.json").read_text())

    (base / "model_index.json").write_text(json.dumps({**index, "../x": ["diffusers", "X"]}))
    refused("model_index.json has a component called '../x'")
    (base / "model_index.json").write_text(json.dumps({**index, "prior": ["diffusers", "X"]}))
    refused("lacks the folder of prior")
    restore("base")
    (base / "scheduler" / "secret.json").symlink_to(tmp_path / "recipe.yaml")
    refused("secret.json is a link to")
    restore("base")

    (expert / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet3DModel"}))
    refused("expert 'anime'", "unet is a UNet3DModel, that of the base", "UNet2DConditionModel")
    shutil.rmtree(expert / "unet")
    (expert / "unet").mkdir()
    (expert / "unet" / "config.json").write_text("{}")
    (expert / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"")
    refused("expert 'anime'", "only pickled weights (diffusion_pytorch_model.bin)")
    restore("anime")
    tensors = load_file(expert / "vae" / "diffusion_pytorch_model.safetensors")
    wrong = {name: array[:1] for name, array in tensors.items()}
    save_file(wrong, expert / "vae" / "diffusion_pytorch_model.safetensors")
    refused("vae.decoder.up_blocks.0.weight has shape (1, 400), expected (400, 400) (and 2 more)")
    encoder = expert / "text_encoder" / "model.fp16.safetensors"
    shutil.copy(encoder, encoder.with_name("model.bf16.safetensors"))
    refused("text_encoder has weights of the variants bf16 and fp16")
    for file in [*expert.iterdir(), expert / "model_index.json"]:
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
    save_file(tensors, expert / "pytorch_lora_weights.safetensors")
    refused("holds a LoRA adapter of a diffusion pipeline", "fuse_lora()")
    save_file(tensors, expert / "model.safetensors")
    (expert / "pytorch_lora_weights.safetensors").unlink()
    (expert / "config.json").write_text(json.dumps({"model_type": "bert"}))
    refused("expert 'anime'", "is one model, the base", "is a diffusion pipeline")
    restore("anime")
    refused("tasks.anime.calibration is missing", command="learn")

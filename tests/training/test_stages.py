"""Every stage, from packages to a checkpoint folder that diffusers loads, with networks of a few thousand weights."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from training import autoencoder, checkpoint, colours, data, finetune, synonyms, text_encoder, tokenizer, unet
from training.captions import Concept
from training.config import CPU, PACKAGES, STYLES, Budget, TrainingConfig
from training.palette import recolour

COLORS = ("red", "green", "blue", "orange", "purple", "brown")


def pack(folder: Path, package: str, member: str, value: object) -> None:
    """An npm package with one JSON file in it."""
    folder.mkdir(parents=True, exist_ok=True)
    name, _, version = package.rpartition("@")
    content = json.dumps(value).encode()
    with tarfile.open(folder / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz", "w:gz") as archive:
        info = tarfile.TarInfo(f"package/{member}")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainingConfig:
    """All stages run for two or three steps on six discs and a ball in three styles."""
    root = tmp_path_factory.mktemp("training")
    icons = {
        f"{color}-disc": {"body": f'<circle cx="8" cy="8" r="7" fill="{color}"/>', "width": 16, "height": 16}
        for color in COLORS
    }
    icons["ball"] = {"body": '<circle cx="8" cy="8" r="7" fill="#0074ba"/>', "width": 16, "height": 16}
    icons["tall-box"] = {"body": '<rect x="4" y="1" width="8" height="14"/>', "width": 16, "height": 16}
    names = [{"label": f"{color} disc", "tags": [color, "round"], "group": 4} for color in COLORS]
    names += [{"label": "ball", "tags": ["toy"], "group": 4}, {"label": "tall box", "group": 7}]
    hidden = [{"label": "flag: red disc", "group": 4}, {"label": "not drawn", "group": 4}, {"label": "red disc"}]
    for style in STYLES:
        pack(root / "npm", PACKAGES[style], "icons.json", {"icons": icons})
    pack(root / "npm", PACKAGES["names"], "en/data.json", [*names, *hidden])
    config = dataclasses.replace(
        CPU,
        work=root / "tiny",
        image_size=16,
        autoencoder_budget=Budget(steps=3),
        autoencoder_batch=4,
        autoencoder_crop=16,
        text_budget=Budget(steps=2),
        text_batch=4,
        text_along_lr=1e-4,
        unet_budget=Budget(steps=2),
        unet_batch=4,
        colours_budget=Budget(steps=2),
        colours_batch=4,
        synonyms_budget=Budget(steps=2),
        synonyms_batch=4,
        finetune_budget=Budget(steps=2),
        finetune_batch=4,
        finetune_shares=(0.6, 0.9),
        autoencoder=dataclasses.replace(CPU.autoencoder, block_out_channels=(8, 8, 8, 8)),
        unet=dataclasses.replace(CPU.unet, block_out_channels=(32, 32)),
    )
    networks = (autoencoder.train, text_encoder.train, unet.train, colours.train, synonyms.train, finetune.train)
    for stage in (data.make, tokenizer.make, *networks, checkpoint.make):
        stage(config)
    return config


def test_pictures_are_rendered_and_named(trained: TrainingConfig) -> None:
    dataset = data.load(trained)
    assert dataset.pictures.shape == (21, 16, 16, 3)
    first = dataset.concepts[0]
    assert (first.slug, first.name, first.keywords) == ("red-disc", "red disc", ("red", "round"))
    middle, corner = dataset.pictures[0, 8, 8], dataset.pictures[0, 0, 0]
    np.testing.assert_array_equal(middle, (255, 0, 0))
    np.testing.assert_array_equal(corner, (255, 255, 255))


def test_the_autoencoder_learns_from_more_pictures_than_the_unet(trained: TrainingConfig) -> None:
    drawn, more = data.load(trained), data.load(trained, trained.autoencoder_groups)
    assert "tall-box" not in {concept.slug for concept in drawn.concepts}
    assert [concept.slug for concept in more.concepts[-3:]] == ["tall-box"] * 3
    np.testing.assert_array_equal(more.pictures[:21], drawn.pictures)


def test_the_tokenizer_learns_nothing_from_held_out_pairs() -> None:
    concepts = tuple(Concept(slug=f"disc-{n}", name=f"disc {n}", keywords=(), group=4) for n in range(60))
    dataset = data.Dataset(pictures=np.zeros((60, 1, 1, 3), np.uint8), concepts=concepts, styles=("noto",) * 60)
    seen, unseen = dataset.split()
    corpus = tokenizer.corpus(dataset)
    assert len(unseen) > 0
    assert all(f"{concepts[n].name}, noto style" in corpus for n in seen)
    assert not any(f"{concepts[n].name}, noto style" in corpus for n in unseen)


def test_the_checkpoint_loads_in_diffusers(trained: TrainingConfig) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers

        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(trained.work / "talbot", dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        output = pipeline("red disc, noto style", num_inference_steps=2, height=16, width=16, output_type="np")
    assert output.images.shape == (1, 16, 16, 3)
    before, first, second = (
        torch.load(trained.work / f"{stage}.pt", weights_only=True)["ema"]["conv_in.weight"]
        for stage in ("unet", "finetune-1", "finetune-2")
    )
    ours = 0.1 * (0.4 * before + 0.6 * first) + 0.9 * second
    assert (ours - second).abs().max() > 1e-5
    torch.testing.assert_close(pipeline.unet.conv_in.weight.detach().float(), ours, rtol=1e-3, atol=1e-6)


def test_the_text_encoder_is_trained_along_or_left_alone(trained: TrainingConfig) -> None:
    name = "text_model.embeddings.position_embedding.weight"
    before = text_encoder.load(trained).state_dict()[name]
    along = torch.load(trained.work / "unet.pt", weights_only=True)
    assert not torch.equal(along["text"][name], before)
    frozen = dataclasses.replace(trained, text_along_lr=None)
    (trained.work / "unet.pt").rename(trained.work / "along.pt")
    unet.train(frozen)
    left = torch.load(trained.work / "unet.pt", weights_only=True)
    (trained.work / "along.pt").replace(trained.work / "unet.pt")
    assert torch.equal(left["text"][name], before)


def test_a_ball_is_drawn_in_every_colour_and_a_red_disc_is_not(trained: TrainingConfig) -> None:
    dataset = data.load(trained)
    own = colours.own_colours(dataset)
    assert {dataset.concepts[n].name: colour for n, colour in own.items()} == {"ball": "blue"}
    encoded, starts = colours.recoloured(trained, dataset, own)
    assert list(starts) == [18, 19, 20]
    assert len(encoded) == 3 * len(colours.others("blue"))
    # The first colour of the second ball, as that picture is encoded.
    picture = recolour(dataset.pictures[19], colours.others("blue")[0])
    expected = autoencoder.encode_all(autoencoder.load(trained), picture[None])[0] * unet.latents(trained)[1]
    torch.testing.assert_close(encoded[starts[19]], expected, rtol=2e-3, atol=2e-3)


def test_the_checkpoint_lies_between_the_last_stages(trained: TrainingConfig) -> None:
    name = "text_model.embeddings.position_embedding.weight"
    states = [
        torch.load(trained.work / f"{stage}.pt", weights_only=True)[key]
        for stage, key in (("unet", "text_ema"), ("colours", "model"), ("synonyms", "model"))
    ]
    states += [torch.load(trained.work / f"finetune-{number}.pt", weights_only=True)["text_ema"] for number in (1, 2)]
    assert all(not torch.equal(one[name], other[name]) for one, other in itertools.pairwise(states))
    written = load_file(trained.work / "talbot/text_encoder/model.safetensors")
    between = torch.lerp(torch.lerp(states[2][name], states[3][name], 0.6), states[4][name], 0.9)
    assert torch.equal(written[name], between.half())
    assert torch.equal(colours.load(trained).state_dict()[name], states[1][name])
    assert torch.equal(synonyms.load(trained).state_dict()[name], states[2][name])


def test_a_run_can_start_from_a_bundle() -> None:
    config = dataclasses.replace(CPU, start=Path(__file__).parents[2] / "runtime/models/talbot")
    torch.manual_seed(0)
    model = autoencoder.Autoencoder(config.autoencoder)
    before = model.encoder.conv_in.weight.detach().clone()
    autoencoder.begin(model, config, "vae")
    assert not torch.equal(model.encoder.conv_in.weight, before)


def test_a_run_that_starts_from_a_bundle_reads_texts_as_it_does(tmp_path: Path) -> None:
    bundle = Path(__file__).parents[2] / "runtime/models/talbot"
    config = dataclasses.replace(CPU, start=bundle, work=tmp_path)
    tokenizer.make(config)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "tokenizer" / name).read_bytes() == (bundle / "tokenizer" / name).read_bytes()
    ours = text_encoder.load(config).state_dict()
    for name, tensor in load_file(bundle / "text_encoder.safetensors").items():
        assert torch.equal(ours[name], tensor.float()), name

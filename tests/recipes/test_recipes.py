"""Recipes: the paper's numbers, what is refused, and that reading them needs no torch."""

import dataclasses
import json
import subprocess
import sys

import pytest

from lambdanets.errors import BadRecipe
from lambdanets.recipes import choose
from lambdanets.recipes.digits import digits
from lambdanets.recipes.folder import folder
from lambdanets.recipes.imagenet import PARETO, finetune, layer_comparison, pareto, pareto_hours
from lambdanets.recipes.recipe import Options, Recipe


def test_recipes_import_no_torch():
    code = (
        "import sys, lambdanets.recipes, lambdanets.recipes.digits, lambdanets.recipes.folder, "
        "lambdanets.recipes.imagenet; assert not {'torch', 'timm', 'PIL', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_layer_comparison_is_the_papers():
    run = layer_comparison()  # docs/paper.md section 4, first column
    assert (run.epochs, run.batch_images, run.lr_per_256, run.warmup_epochs) == (90, 4096, 0.1, 5)
    assert (run.optimizer, run.momentum, run.weight_decay, run.label_smoothing) == ("sgd", 0.9, 1e-4, 0.1)
    assert (run.augment, run.randaugment_ops, run.drop_rate, run.drop_path_rate) == ("imagenet", 0, 0.0, 0.0)
    assert (run.ema_decay, run.image_px, run.model) == (0.9999, 224, "resnet50_llll")
    assert run.peak_lr == pytest.approx(1.6)


@pytest.mark.parametrize(
    ("depth", "image_px", "magnitude", "drop_path"),
    [(50, 128, 10, 0.0), (50, 160, 10, 0.0), (101, 192, 15, 0.0), (152, 224, 15, 0.1), (270, 256, 15, 0.1),
     (350, 288, 15, 0.2), (420, 320, 15, 0.2)],
)  # fmt: skip
def test_pareto_is_the_papers(depth, image_px, magnitude, drop_path):
    run = pareto(depth, image_px)  # docs/paper.md section 4, second column
    assert (run.epochs, run.batch_images, run.lr_per_256, run.warmup_epochs) == (350, 4096, 0.1, 5)
    assert (run.optimizer, run.momentum, run.weight_decay, run.label_smoothing) == ("sgd", 0.9, 4e-5, 0.1)
    assert (run.augment, run.randaugment_ops, run.randaugment_magnitude) == ("imagenet", 2, magnitude)
    assert 0.2 <= run.drop_rate <= 0.3
    assert (run.drop_path_rate, run.ema_decay) == (drop_path, 0.9999)
    assert (run.model, run.image_px) == (f"lambda_resnet{depth}", image_px)


def test_unconfirmed_values_are_said_to_be():
    for recipe in (layer_comparison, pareto):
        assert " R" in recipe.__doc__
        assert "the paper reports" in recipe.__doc__


@pytest.mark.parametrize("recipe", [layer_comparison, lambda small: pareto(152, 224, small=small)])
def test_the_small_form_changes_size_and_length_only(recipe):
    run, small = recipe(small=False), recipe(small=True)
    changed = {f.name for f in dataclasses.fields(Recipe) if getattr(run, f.name) != getattr(small, f.name)}
    sizes = {"name", "model", "image_px", "epochs", "warmup_epochs", "batch_images", "eval_batch_images"}
    assert changed == sizes
    assert small.warmup_epochs / small.epochs == pytest.approx(run.warmup_epochs / run.epochs)


@pytest.mark.parametrize(
    "run", [digits(), folder(), layer_comparison(), pareto(50, 128), finetune()], ids=lambda r: r.name
)
def test_a_recipe_survives_json(run):
    assert Recipe(**json.loads(json.dumps(dataclasses.asdict(run)))) == run


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("image_px", 0), ("epochs", 0), ("batch_images", 0), ("eval_batch_images", 0), ("in_channels", 2),
        ("lr_per_256", 0.0), ("lr_per_256", float("nan")), ("optimizer", "lion"),
        ("accumulation", 0), ("clip_norm", -1.0), ("batch_norm", "mine"), ("precision", "int8"),
        ("mixup_alpha", -0.1), ("cutmix_alpha", -0.1), ("erase_frac", 1.1), ("augment", "cutout"),
        ("flip_frac", -0.1), ("flip_frac", 1.1), ("flip_frac", float("nan")), ("min_crop_frac", 0.0),
        ("min_crop_frac", 1.1),
        ("interpolation", "nearest"), ("momentum", 1.0), ("label_smoothing", 1.0), ("drop_rate", -0.1),
        ("drop_path_rate", 1.0), ("ema_decay", 1.0), ("weight_decay", -1e-4), ("crop_frac", 0.0),
        ("randaugment_ops", -1), ("mean", (0.5,)), ("std", (0.5,)),
        ("std", (0.5, 0.0, 0.5)), ("warmup_epochs", 90), ("warmup_epochs", -1), ("name", "a/b"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_used_is_refused_by_name(argument, value):
    with pytest.raises(BadRecipe, match=f"^{argument} must be"):
        dataclasses.replace(layer_comparison(), **{argument: value})


def test_randaugment_needs_the_transforms_it_goes_with():
    with pytest.raises(BadRecipe, match="randaugment_ops is 2"):
        dataclasses.replace(digits(), randaugment_ops=2, randaugment_magnitude=9)
    with pytest.raises(BadRecipe, match="randaugment_magnitude must be in 3 to 15, not 16"):
        dataclasses.replace(layer_comparison(), randaugment_ops=2, randaugment_magnitude=16)


def test_choose_replaces_only_what_is_given():
    assert choose("digits") == digits()
    assert choose("folder") == folder()
    run = choose("folder", model="resnet50_llll", image_px=32, epochs=20, batch_images=8, lr_per_256=0.2)
    assert run == dataclasses.replace(
        folder(), model="resnet50_llll", image_px=32, epochs=20, warmup_epochs=1.0, batch_images=8, lr_per_256=0.2
    )


STRENGTHS = {
    "flip_frac": 0.0, "min_crop_frac": 0.5, "randaugment_ops": 0, "randaugment_magnitude": 5, "erase_frac": 0.25,
    "mixup_alpha": 0.2, "cutmix_alpha": 1.0, "label_smoothing": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("name", ["folder", "pareto", "finetune", "layer_comparison"])
def test_choose_takes_every_strength_of_augmentation_a_zero_too(name):
    plain, given = choose(name), dict(STRENGTHS)
    if not plain.randaugment_ops:
        given["randaugment_ops"] = 2
    for one, value in given.items():
        if one == "randaugment_magnitude" and not plain.randaugment_ops:
            continue
        more = {"randaugment_magnitude": 9} if (one, value) == ("randaugment_ops", 2) else {}
        run = choose(name, **{one: value}, **more)
        assert run == dataclasses.replace(plain, **{one: value}, **more)
        assert run != plain


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("digits", {"flip_frac": 0.5}, "flip_frac is 0.5, but flips and crops go with augment='imagenet' only"),
        ("digits", {"min_crop_frac": 0.5}, "min_crop_frac is 0.5, but flips and crops"),
        ("digits", {"randaugment_ops": 1, "randaugment_magnitude": 9}, "RandAugment goes with augment='imagenet' only"),
        ("layer_comparison", {"randaugment_magnitude": 9}, "randaugment_ops is 0: give both"),
        ("layer_comparison", {"randaugment_ops": 1}, "randaugment_magnitude must be in 3 to 15, not 0"),
        ("folder", {"randaugment_magnitude": 16}, "randaugment_magnitude must be in 3 to 15, not 16"),
    ],
)
def test_a_strength_that_would_do_nothing_is_refused(name, given, message):
    with pytest.raises(BadRecipe, match=message):
        choose(name, **given)


def test_choose_finds_the_papers_row_by_model_and_size():
    assert choose("pareto", model="lambda_resnet350", image_px=288) == pareto(350, 288)
    assert choose("layer_comparison", model="resnet50_clll").model == "resnet50_clll"
    assert choose("pareto", model="lambda_resnet350", image_px=288, small=True) == pareto(350, 288, small=True)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("nothing", {}, "recipe must be"),
        ("digits", {"epochs": 0}, "epochs must be at least 1"),
        ("pareto", {"model": "resnet50_llll"}, "lambda_resnetDEPTH"),
        ("pareto", {"model": "lambda_resnet51"}, "depth must be one of 50, 101"),
    ],
)
def test_choose_refuses(name, given, message):
    with pytest.raises(BadRecipe, match=message):
        choose(name, **given)


def test_every_row_of_the_papers_figure_is_a_recipe_with_its_hours():
    assert len(PARETO) == 12  # docs/paper.md section 3
    for (depth, image_px), (seconds, top1) in PARETO.items():
        run = pareto(depth, image_px)
        steps = run.epochs * 1_281_167 / 1024
        assert pareto_hours(depth, image_px) == pytest.approx(seconds * steps / 3600)
        assert f"{depth},{image_px} {top1:g}" in " ".join(pareto.__doc__.split())
    with pytest.raises(BadRecipe, match="no row of the paper's figure; those are 50 at 128"):
        pareto_hours(50, 224)


@pytest.mark.parametrize(
    "recipe", [digits, folder, layer_comparison, finetune, lambda small: pareto(50, 128, small=small)]
)
def test_every_recipe_has_a_small_form(recipe):
    small = recipe(small=True)
    assert small.name.endswith("_small")
    assert small.model == "lambda_resnet_tiny"
    assert small.image_px <= 32
    assert choose(small.name.removesuffix("_small"), small=True) == small


def test_fine_tuning_says_that_nothing_of_it_is_the_papers():
    assert "All of it is R" in finetune.__doc__
    assert (finetune().batch_norm, finetune().ema_decay, finetune().clip_norm) == ("frozen", 0.0, 1.0)


def test_a_recipe_of_the_first_version_is_understood():
    record = dataclasses.asdict(digits())
    for new in (
        "precision",
        "accumulation",
        "clip_norm",
        "decay_everything",
        "batch_norm",
        "erase_frac",
        "mixup_alpha",
        "flip_frac",
        "min_crop_frac",
    ):
        del record[new]
    assert Recipe.from_json({**record, "amp": True}) == digits()
    assert Recipe.from_json({**record, "amp": False}).precision == "float32"


@pytest.mark.parametrize(("option", "value"), [("save_steps", -1), ("log_steps", 0), ("skip_non_finite", 11)])
def test_an_option_that_cannot_be_used_is_refused_by_name(option, value):
    with pytest.raises(BadRecipe, match=f"^{option} must be"):
        Options(**{option: value})
